"""`python -m rllr.lora merge` was this command's name until 0.2; it is python -m rllr.merge now. Adapters are in rllr.model.lora."""

from .model.roles import merge_command

if __name__ == "__main__":
    merge_command()
