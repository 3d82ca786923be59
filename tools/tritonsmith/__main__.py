import sys

from tritonsmith.cli import main

sys.exit(main())
