import sys

from .redirect import main

main(sys.argv[1:])
