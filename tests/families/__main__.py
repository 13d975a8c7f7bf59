"""The table of families and readers: `python -m tests.families [--why] [NAME ...]`.

`--write` writes it to `results.txt`, which the test compares.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from families import table

if __name__ == "__main__":
    table.main(sys.argv[1:])
