"""python -m rllr.rationales"""

from .writers import main

main()
