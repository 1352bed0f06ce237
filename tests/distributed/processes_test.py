"""Several processes, as on a pod: the same masks, sharded checkpoints, kills."""

import argparse
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import agreement
import killed
import processes

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 900  # seconds; on a quiet machine each start takes some ten


def _quickly(monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


def test_two_processes_give_the_masks_of_one(tmp_path):
    names = ["rigl", "gmp, 2:4", "sparsegpt, 2:4"]
    args = argparse.Namespace(only=names, steps=30, timeout=TIMEOUT)
    one = agreement.spawn(tmp_path, (1, 1, "auto"), args)
    many = agreement.spawn(tmp_path, (2, 4, "explicit"), args)
    rows = agreement.compare(one, many)
    assert list(rows) == sorted(names)
    for name, row in rows.items():
        assert row["same"] is not False, name
        assert row["loss"] <= 1e-4, name
        assert row["masks"] >= 0.999, name


@pytest.mark.parametrize("number", [1, 2])
def test_killed_and_restarted(number, tmp_path, monkeypatch):
    """In training, in a mask update and in a save; of two processes, one."""
    _quickly(monkeypatch)
    args = argparse.Namespace(
        kills=3, counts=[number], method="rigl", steps=60,
        seed=number, timeout=TIMEOUT, background=number > 1,
    )  # fmt: skip
    rows = killed.disturbed(args, number, tmp_path)  # which compares all of the state
    assert len(rows) == args.kills


def test_the_example_holds_a_share_of_each_weight(tmp_path, monkeypatch):
    """Saved by two processes, restored in one; the same bits."""
    _quickly(monkeypatch)
    command = [str(ROOT / "examples" / "pod_pruning.py"), "--folder", str(tmp_path)]
    said = processes.run(
        [*command, "--steps", "12"], processes=2, devices=2, timeout=TIMEOUT
    )
    for i in range(2):
        assert f"process {i} holds 0.500 of a weight" in said[i]
    there = processes.run(
        [*command, "--restore"], processes=1, devices=8, timeout=TIMEOUT
    )
    for text in (said[0], there[0]):
        assert "equal when unpacked: True" in text
    assert _fingerprint(said[0]) == _fingerprint(there[0])


def test_one_shot_saved_packed_by_two_processes_runs_in_one(tmp_path, monkeypatch):
    """None holds more of a weight than it has; other devices get the same bits."""
    _quickly(monkeypatch)
    command = [str(ROOT / "examples" / "pod_one_shot.py"), "--folder", str(tmp_path)]
    pruned = ["--steps", "2", "--batches", "1", "--method", "wanda"]
    said = processes.run([*command, *pruned], processes=2, devices=2, timeout=TIMEOUT)
    for i in range(2):
        assert f"process {i} holds 0.500 of a weight" in said[i]
    there = processes.run(
        [*command, "--restore"], processes=1, devices=8, timeout=TIMEOUT
    )
    for text in (said[0], there[0]):
        assert "equal when unpacked: True" in text
        (losses,) = re.findall(r"loss ([\d.]+), of packed weights ([\d.]+)", text)
        dense, packed = map(float, losses)
        assert packed == pytest.approx(dense, abs=2e-4)  # four places are printed
    assert _fingerprint(said[0]) == _fingerprint(there[0])


def _fingerprint(text):
    (found,) = re.findall(r"fingerprint ([0-9a-f]{8})", text)  # Gloo talks in between
    return found


def test_a_process_that_fails_ends_the_others(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\n"
        "if '--process' in sys.argv and sys.argv[-1] == '1':\n"
        "    sys.exit('one is enough')\n"
        "time.sleep(1000)\n"
    )
    with pytest.raises(
        processes.FailedError, match=r"process 1 ended.*\n*one is enough"
    ):
        processes.run([str(script)], processes=2, devices=1, timeout=TIMEOUT)
