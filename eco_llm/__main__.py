"""`python -m eco_llm` is `eco_train`."""

import sys

from eco_llm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
