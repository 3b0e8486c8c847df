"""What every trainer of the tests is given: float32 on the CPU, nothing logged to services, no bars."""

from typing import Any

QUIET: dict[str, Any] = {
    "report_to": "none",
    "disable_tqdm": True,
    "bf16": False,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}
