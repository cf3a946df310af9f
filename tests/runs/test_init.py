import subprocess
import sys
from pathlib import Path

import fedllm_flwr.runs


def test_reading_a_run_needs_no_framework() -> None:
    names = sorted(path.stem for path in Path(fedllm_flwr.runs.__file__).parent.glob("*.py"))
    imports = "; ".join(f"import fedllm_flwr.runs.{name}" for name in names if name != "__init__")
    heavy = {"torch", "flwr", "hydra", "omegaconf", "transformers", "peft", "ray", "tensorflow"}
    program = f"{imports}\nimport sys; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
