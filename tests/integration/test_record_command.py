"""`moe-lens record`: scripts that know nothing of it run as they would, and leave a trace."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from support.tables import frame

from moe_lens.trace.reader import open_run

TESTS = Path(__file__).parents[1]
MODEL = """
    import sys
    import torch
    from support.models import TinyModel

    torch.manual_seed(0)
    model = TinyModel()
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    batch = {"input_ids": torch.arange(8).view(2, 4), "attention_mask": mask}
"""


@pytest.fixture
def script(tmp_path):
    """Writes a script that begins with a small model and a batch (or with nothing)."""

    def write(text, *, name="script.py", begin=MODEL):
        path = tmp_path / name
        path.write_text(textwrap.dedent(begin) + textwrap.dedent(text))
        return path

    return write


@pytest.fixture
def environment():
    path = os.pathsep.join(p for p in (str(TESTS), os.environ.get("PYTHONPATH", "")) if p)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def python(tmp_path, environment):
    """Runs python in `tmp_path`, without or with `moe-lens record` before the words."""

    def run(*words, **more):
        return subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=tmp_path,
            env=environment | more.pop("env", {}),
            capture_output=True,
            text=True,
            timeout=200,
            **more,
        )

    return run


@pytest.fixture
def record(python):
    def run(*words, out="out", **more):
        return python("-m", "moe_lens", "record", "--out", out, *words, **more)

    return run


def ours(done):
    """What moe-lens said, and what is left of stderr."""
    lines = done.stderr.splitlines(keepends=True)
    said = [x.removeprefix("moe-lens: ").rstrip() for x in lines if x.startswith("moe-lens: ")]
    return said, "".join(x for x in lines if not x.startswith("moe-lens: "))


def test_the_script_runs_as_it_would_and_its_model_is_recorded(script, python, record, tmp_path):
    path = script("""
        import __main__
        print(sys.argv, __name__, __file__, __main__.model is model, sys.path[0], __package__)
        print(model(**batch).sum().item(), sys.stdin.read())
        print("to stderr", file=sys.stderr)
        sys.exit(3)
    """)
    (tmp_path / "sub").mkdir()
    path.rename(tmp_path / "sub" / path.name)
    words = (f"sub/{path.name}", "--out", "mine", "--", "-x", "--help")
    plain = python(*words, input="from stdin")
    done = record("--tokens", "1.0", *words, input="from stdin")
    assert (done.stdout, done.returncode) == (plain.stdout, 3)
    said, rest = ours(done)
    assert rest == plain.stderr == "to stderr\n"
    run = Path("out") / "TinyModel"
    assert said == [
        f"recording TinyModel (2 MoE layers) into {run}",
        f"1 step, 6 tokens in {run}; next: moe-lens report {run}",
    ]
    steps = frame(tmp_path / run, "steps")
    assert steps.tokens.tolist() == [6]
    attempt = open_run(tmp_path / run).meta.attempts[-1]
    assert (attempt.end, attempt.error) == ("failed", "SystemExit: 3")


def test_the_trace_of_a_training_equals_that_of_an_explicit_recording(
    script, python, record, tmp_path
):
    loop = """
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for step in range(3):
            {step}
                for micro in range(2):
                    model(**batch).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            model(**batch)
    """
    quiet = script(loop.format(step="if True:"))
    begin = MODEL + '    import moe_lens\n    rec = moe_lens.record(model, "told", tokens=1.0)\n'
    told = script(loop.format(step="with rec.step():"), name="told.py", begin=begin)
    done = record("--tokens", "1.0", quiet.name)
    assert done.returncode == 0, done.stderr
    assert python(told.name).returncode == 0
    run = tmp_path / "out" / "TinyModel"
    assert frame(run, "steps").groupby("step").size().tolist() == [2, 2, 2, 1]
    for name in ("load", "layers", "routers", "slices", "steps", "tokens", "routing"):
        a, b = (frame(x, name) for x in (run, tmp_path / "told"))
        keys = [c for c in a if c not in ("t_start_ns", "host_ns", "device_ns")]
        pd.testing.assert_frame_equal(a[keys], b[keys], obj=name)
    assert open_run(run).meta.attempts[-1].end == "closed"


def test_a_module_with_its_arguments(script, python, record, tmp_path):
    script("print('package', __name__)", name="package.py", begin="")
    path = script("print(sys.argv[1:], __name__, __spec__.name); model(**batch)", name="run.py")
    (tmp_path / "pack").mkdir()
    path.rename(tmp_path / "pack" / "run.py")
    plain = python("-m", "pack.run", "--flag", "1")
    done = record("-m", "pack.run", "--flag", "1")
    assert (done.stdout, done.returncode) == (plain.stdout, 0)
    assert len(frame(tmp_path / "out" / "TinyModel", "steps")) == 1
    missing = record("-m", "no_such_module", out="other")
    assert missing.returncode == python("-m", "no_such_module").returncode == 1
    assert ours(missing)[1] == python("-m", "no_such_module").stderr


def test_an_exception_is_the_scripts_own(script, python, record, tmp_path):
    path = script("""
        class Fails(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = model

            def forward(self, **given):
                self.inner(**given)
                try:
                    {}["key"]
                except KeyError as e:
                    raise ValueError("out of luck") from e

        Fails()(**batch)
    """)
    plain, done = python(path.name), record(path.name)
    assert done.returncode == plain.returncode == 1
    said, rest = ours(done)
    assert frames(rest) == frames(plain.stderr)  # without one of ours
    assert [f[1] for f in frames(rest)] == ["forward", "<module>", "forward"]
    assert rest.splitlines()[-1] == plain.stderr.splitlines()[-1]
    attempt = open_run(tmp_path / "out" / "Fails").meta.attempts[-1]
    assert (attempt.end, attempt.error) == ("failed", "ValueError: out of luck")
    assert said[-1].startswith("0 steps, 0 tokens in out/Fails")


def frames(traceback):
    """(file and line, function); without torch's own, which differ where a module has hooks."""
    found = re.findall(r'File "(.+?", line \d+), in (\S+)', traceback)
    return [f for f in found if "/torch/" not in f[0]]


def test_a_syntax_error_is_the_scripts_own(script, python, record):
    path = script("this is not python", begin="")
    plain, done = python(path.name), record(path.name)
    assert (done.returncode, ours(done)[1]) == (plain.returncode, plain.stderr)


def test_ctrl_c_ends_it_as_python_would(script, environment, tmp_path):
    path = script("""
        import atexit, time
        atexit.register(print, "script's own end", flush=True)
        model(**batch)
        print("ready", flush=True)
        time.sleep(60)
    """)
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_lens", "record", "--out", "out", path.name],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT
    assert out == "script's own end\n"
    assert "Traceback (most recent call last)" in err
    assert "KeyboardInterrupt" in err
    assert "moe_lens/" not in err
    attempt = open_run(tmp_path / "out" / "TinyModel").meta.attempts[-1]
    assert (attempt.end, attempt.error) == ("failed", "KeyboardInterrupt: ")


def test_threads_that_outlive_the_script_are_recorded_in_the_default_folder(
    script, python, tmp_path
):
    path = script("""
        import threading, time
        def later():
            time.sleep(1)
            model(**batch)
        model(**batch)
        threading.Thread(target=later).start()
    """)
    assert python("-m", "moe_lens", "record", path.name).returncode == 0
    (folder,) = (tmp_path / "traces").iterdir()
    assert time.strptime(folder.name, "script-%Y%m%d-%H%M%S")
    assert len(frame(folder / "TinyModel", "steps")) == 2


def test_what_the_script_sets_before_torch_is_loaded_counts(script, record):
    path = script(
        """
        import os, sys
        heavy = {"torch", "numpy", "pyarrow"} & set(sys.modules)
        os.environ["OMP_NUM_THREADS"] = "1"
        import torch
        print(heavy, torch.get_num_threads())
        """,
        begin="",
    )
    assert record(path.name, env={"OMP_NUM_THREADS": "2"}).stdout == "set() 1\n"


def test_each_model_has_a_folder(script, record, tmp_path):
    path = script("""
        from support.models import TinyBlock
        model(**batch)
        draft = torch.nn.Sequential(torch.nn.Embedding(32, 8), TinyBlock())
        for _ in range(2):
            draft(batch["input_ids"])
        again = TinyModel()
        again(**batch)
    """)
    assert record(path.name).returncode == 0
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["Sequential", "TinyModel", "TinyModel-2"]
    assert [len(frame(tmp_path / "out" / n, "steps")) for n in names] == [2, 1, 1]


def test_where_there_is_nothing_to_record_it_says_so_at_the_end(script, record, tmp_path):
    dense = script("torch.nn.Linear(2, 2)(torch.ones(2)); sys.exit(5)")
    done = record(dense.name)
    assert done.returncode == 5
    (said,), _ = ours(done)
    assert said.startswith("nothing was recorded: no module with MoE layers was called")
    assert not (tmp_path / "out").exists()
    light = script("print('hello')", begin="")
    done = record(light.name)
    assert (done.returncode, done.stdout) == (0, "hello\n")
    assert ours(done)[0] == ["nothing was recorded: the script did not import torch."]


def test_a_router_that_cannot_be_seen_does_not_stop_the_script(script, record):
    path = script("""
        class SoftMoE(torch.nn.Module):
            def forward(self, x):
                return x
        SoftMoE()(torch.ones(1))
        print("goes on")
    """)
    done = record(path.name)
    assert (done.stdout, done.returncode) == ("goes on\n", 0)
    said, _ = ours(done)
    assert "is a soft mixture" in said[0]
    assert said[1].startswith("nothing was recorded (see above)")


def test_a_forked_child_is_the_scripts_own(script, record, tmp_path):
    path = script("""
        import os
        model(**batch)
        sys.stdout.flush()
        if os.fork() == 0:
            model(**batch)
            TinyModel()(**batch)
            sys.exit(0)
        os.wait()
        model(**batch)
    """)
    done = record(path.name)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["TinyModel"]
    assert len(frame(tmp_path / "out" / "TinyModel", "steps")) == 2
    assert len(ours(done)[0]) == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere.py"], "nowhere.py is not a file"),
        (["--no-such-option", "script.py"], "No such option"),
        (["--tokens", "2", "script.py"], "Invalid value for '--tokens'"),
        ([], "Missing argument"),
    ],
)
def test_a_mistake_is_one_error_before_anything_runs(script, python, words, says):
    script("print('ran')")
    done = python("-m", "moe_lens", "record", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_that_is_taken_is_refused_before_anything_runs(script, record, tmp_path):
    path = script("print('ran')")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    done = record(path.name)
    assert (done.returncode, done.stdout) == (2, "")
    assert "out is not empty: name another folder with --out" in done.stderr


LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_processes_of_a_launch_write_one_trace(script, python, tmp_path):
    path = script("""
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel
        dist.init_process_group("gloo")
        model = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2 + dist.get_rank()):
            with model.no_sync():
                model(**batch).sum().backward()
            optimizer.step()
        dist.barrier()
        dist.destroy_process_group()
    """)
    done = python(*LAUNCH, "-m", "moe_lens", "record", "--out", "out", path.name)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["TinyModel"]
    metas = open_run(tmp_path / "out" / "TinyModel").metas
    assert {r: (m.rank, m.world) for r, m in metas.items()} == {0: (0, 2), 1: (1, 2)}
    import moe_lens

    with moe_lens.open(tmp_path / "out" / "TinyModel") as trace:
        counted = trace.sql("select rank, count(*) n from steps group by all order by all").rows()
    assert counted == [{"rank": 0, "n": 2}, {"rank": 1, "n": 3}]
    said, _ = ours(done)
    assert [x.split(" ")[0] for x in said] == ["recording", "rank"]  # of the first process alone
    assert said[1].startswith("rank 0 of 2: 2 steps, 12 tokens in out/TinyModel")


def test_a_launch_whose_processes_do_not_talk_goes_by_its_environment(script, record, tmp_path):
    path = script("model(**batch)")
    launched = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    done = record(path.name, env=launched)
    assert done.returncode == 0, done.stderr
    assert ours(done)[0] == []  # the first process speaks
    metas = open_run(tmp_path / "out" / "TinyModel").metas
    assert {r: (m.rank, m.world) for r, m in metas.items()} == {1: (1, 2)}
    assert "out is not empty" in record(path.name, env=launched).stderr


def test_a_launch_needs_a_folder_that_all_processes_know(script, python):
    path = script("print('ran')", begin="")
    done = python("-m", "moe_lens", "record", path.name, env={"WORLD_SIZE": "2", "RANK": "0"})
    assert (done.returncode, done.stdout) == (2, "")
    assert "name a folder with --out" in done.stderr


def test_generation_is_recorded_forward_by_forward(script, record, tmp_path):
    path = script(
        """
        import torch
        from support.models import build
        model = build("mixtral")
        ids = torch.arange(1, 7).view(2, 3)
        print(model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).tolist())
        """,
        begin="",
    )
    done = record(path.name)
    assert done.returncode == 0, done.stderr
    steps = frame(tmp_path / "out" / "MixtralForCausalLM", "steps")
    assert steps.phase.tolist() == ["prefill", "decode", "decode", "decode"]
    assert steps.tokens.tolist() == [6, 2, 2, 2]
    from support.models import build

    with torch.no_grad():
        ids = torch.arange(1, 7).view(2, 3)
        plain = build("mixtral").generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert done.stdout == f"{plain.tolist()}\n"
