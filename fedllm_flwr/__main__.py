"""``python -m fedllm_flwr`` is ``fedllm``."""

import sys

from fedllm_flwr.cli import main

sys.exit(main())
