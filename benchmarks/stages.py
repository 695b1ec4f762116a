"""Stages of a benchmark as processes: what has run does not run again, and what it took is kept beside it."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata, util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIRST_TUNING_SEED = 100  # seeds from here on choose settings, the others are reported


class Stages:
    """Stages below a directory of runs.

    code: the paths whose last commit is noted with each stage. threads: of each process.
    """

    def __init__(self, runs, code, threads=1):
        self.runs, self.threads = runs, threads
        self.commit = commit_of(code)
        self.stages = {}  # {name: what the stage took}

    def stage(self, directory, *words):
        """Run `python <words> --output_dir <directory>` unless that has run already; what it took is kept beside it.

        Exits where the process fails, naming its log, and where it has run with other flags.
        """
        mark, log = (directory.parent / f"{directory.name}.{end}" for end in ("done.json", "log"))
        command = [sys.executable, *map(str, words), "--output_dir", str(directory), "--overwrite"]
        typed = self.as_typed(command[1:])
        if not mark.exists():
            begun = f"{time.strftime('%H:%M:%S')}  {directory.relative_to(self.runs)}\n"
            print(begun, end="", flush=True)  # in one piece, as other stages print, too
            directory.parent.mkdir(parents=True, exist_ok=True)
            path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "PYTHONPATH": path}
            start = time.monotonic()
            with open(log, "w") as file:
                process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
                try:
                    _, status, used = os.wait4(process.pid, 0)
                    process.returncode = os.waitstatus_to_exitcode(status)
                except BaseException:
                    process.kill()
                    raise
            if status:
                sys.exit(f"{directory}: failed, see {log}; finished stages will not run again")
            # a busy machine stretches processor time less than the clock's
            took = {"seconds": time.monotonic() - start, "cpu_seconds": used.ru_utime + used.ru_stime}
            took = {name: round(value, 1) for name, value in took.items()}
            mark.write_text(json.dumps({"command": typed, **took, "commit": self.commit}))
        done = json.loads(mark.read_text())
        if done["command"] != typed:
            sys.exit(
                f"{mark}: this stage has run with other flags; remove that file and {directory.name}, with what was "
                "made of it, or give another --runs"
            )
        self.stages[directory.name] = done

    def as_typed(self, words):
        """A command line without this machine's paths."""
        return " ".join(["python", *words]).replace(f"{self.runs.parent}/", "runs/").replace(f"{ROOT}/", "")

    def cpu(self, *names):
        """Processor seconds of finished stages."""
        return sum(self.stages[name]["cpu_seconds"] for name in names)

    def commits(self):
        """The commits of all stages, in words."""
        return " and ".join(sorted({done["commit"] for done in self.stages.values()}))


def longer_sft(flags, stages, *, start=0.0):
    """Flags of an SFT that takes as much processor time as RLLR's three stages together, with as many looks at dev.

    flags: words of the SFT stage. start: its processor seconds before the first pass.
    """
    factor = 1 + stages.cpu("rm-label", "ppo-label") / (stages.cpu("sft") - start)
    longer = {name: max(1, round(factor * number_of(flags, name, 1))) for name in ("--epochs", "--eval_every")}
    return [word for pair in longer.items() for word in pair]


def number_of(flags, name, default=None):
    """The whole number behind the last `name` among words."""
    places = [place for place, word in enumerate(flags) if word == name]
    return int(flags[places[-1] + 1]) if places else default


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def commit_of(code):
    """The last commit that changed some of the paths; "... with changes" where files differ from it."""

    def git(*words):
        found = subprocess.run(["git", "-C", str(ROOT), *words, "--", *code], capture_output=True, text=True)
        return found.stdout.strip()

    commit = git("log", "-1", "--format=%h", "--abbrev=7") or "no git"
    return f"{commit} with changes" if git("status", "--porcelain") else commit


def machine(threads=1):
    """Processor and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    named = ("torch", "transformers", "scikit-learn")
    versions = {name: metadata.version(name) for name in named if util.find_spec(name.replace("scikit-", "sk"))}
    versions = {"python": platform.python_version(), **versions}
    return {
        "processor": next(names, platform.machine()),
        "cores": os.cpu_count(),
        "threads": threads,
        "versions": versions,
    }
