"""Thin entry point: `python train_sigma.py @train_sigma_args.txt` is `eco_train @train_sigma_args.txt`."""

import sys

from eco_llm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
