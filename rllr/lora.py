"""Adapters are in rllr.model.lora. This file only tells the new name of `python -m rllr.lora merge`."""

import sys

if __name__ == "__main__":
    sys.exit("error: python -m rllr.lora merge is python -m rllr.merge now, with the same flags")
