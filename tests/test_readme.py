"""What the README shows is what its commands print."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_command_prints_what_is_shown():
    shown = re.search(r"```\n\$ instil (.*)\n([\s\S]*?)```", README)
    assert shown is not None
    done = subprocess.run(
        [sys.executable, "-m", "instil", *shown[1].split()], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.rstrip("\n") == shown[2].rstrip("\n")
