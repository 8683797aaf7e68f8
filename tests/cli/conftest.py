"""The real command, run as a user runs it."""

import os
import subprocess
import sys

import pytest


@pytest.fixture
def instil(tmp_path):
    def run(*arguments, code=0, stdin=None, **env):
        done = subprocess.run(
            [sys.executable, "-m", "instil", *arguments],
            capture_output=True,
            text=True,
            input=stdin,
            cwd=tmp_path,
            env={**os.environ, "INSTIL_CACHE": str(tmp_path / "cache"), "COLUMNS": "200", **env},
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run
