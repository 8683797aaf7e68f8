"""Memory does not grow with the data: a process is measured on a small file and on one 20 times larger."""

import subprocess
import sys

import pytest

READ = """
import resource, sys, instil
count = sum(1 for _ in instil.read(sys.argv[1]))
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
ROW = '{"instruction": "Count to %d.", "input": "", "output": "It would take a while, but here is %d."}\n'


@pytest.mark.prove
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_million_rows_take_no_more_memory_than_fifty_thousand(tmp_path, suffix):
    peaks = {}
    for rows in (50_000, 1_000_000):
        file = tmp_path / f"rows.{suffix}"
        with file.open("w") as out:
            if suffix == "json":
                out.write("[\n")
            for number in range(rows):
                line = ROW % (number, number)
                out.write(line.rstrip("\n") + ("\n]" if number == rows - 1 else ",\n") if suffix == "json" else line)
        done = subprocess.run([sys.executable, "-c", READ, str(file)], capture_output=True, text=True, check=True)
        count, peaks[rows] = map(int, done.stdout.split())
        assert count == rows
    assert peaks[1_000_000] < peaks[50_000] + 20_000, "kilobytes"
