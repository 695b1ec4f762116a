"""What every room uses: errors, flags, the log, files."""
