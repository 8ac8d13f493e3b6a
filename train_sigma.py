"""Thin entry point: `python train_sigma.py @train_sigma_args.txt` is `eco_train @train_sigma_args.txt`.

The frozen executable starts here too, and is asked first whether it was started in Python's place (eco_llm/frozen.py).
"""

import sys

from eco_llm.cli.main import main
from eco_llm.frozen import is_frozen, stand_in_for_python

if __name__ == "__main__":
    if is_frozen():
        stand_in_for_python()
    sys.exit(main())
