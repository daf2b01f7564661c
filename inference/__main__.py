import sys

from inference.command_line import main

sys.exit(main())
