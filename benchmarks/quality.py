"""Does the label-sensitive reward help on real tasks? One cell: a task, a model, a seed, and every method.

    python benchmarks/quality.py --data data --task sst2 --seed 0       # data/sst2/train.jsonl, data/sst2/dev.jsonl
    python benchmarks/quality_tables.py                                 # the tables, made of the cells alone

A hash of the row id halves the dev file. One half chooses epochs, steps and settings (--eval_file), the other is only
reported. The stages run as processes of one thread, --jobs at once; finished ones do not run again. At the end the cell
is written: benchmarks/results/cells/<task>-<model>-<seed>.json, with every predicted label, metrics, the preview, what
PPO handed back, seconds, commit and versions. TF-IDF needs scikit-learn: pip install ".[bench]".

A pretrained model takes --model DIR, a GPU and fewer methods. Its decoding and updates leave most of a GPU idle, so a
cell's stages, and cells in processes of their own (quality_cells.py, within a budget of time), share one:

    python benchmarks/quality.py --data data --task sst2 --seed 0 --model DIR --precision bf16 --jobs 3

Settings are chosen with --tune: seeds from 100 on, figures of the choosing half alone, cells in the runs' directory.
"""

import argparse
import fcntl
import hashlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib import util
from pathlib import Path

from stages import FIRST_TUNING_SEED, ROOT, Stages, longer_sft, machine, number_of, read

sys.path.insert(0, str(ROOT))
CELLS = ROOT / "benchmarks" / "results" / "cells"
CODE = ["rllr", "train_sft.py", "train_rm.py", "train_ppo.py"]
CODE += [f"benchmarks/{name}.py" for name in ("quality", "quality_stages", "stages")]
BEST_OF = 8  # answers of which the label reward model chooses one

METHODS = {  # in a cell: what a table calls it
    "sft-label": "SFT, label only",
    "sft": "SFT with rationale",
    "sft-long": "SFT as long as all stages",
    "ppo-rationale/best": "RLHF (rationale reward), handed back",
    "ppo-rationale/last": "RLHF (rationale reward), last",
    "ppo-label/best": "RLLR, handed back",
    "ppo-label/last": "RLLR, last",
    "ppo-mixed/best": "RLLR-mixed, handed back",
    "ppo-mixed/last": "RLLR-mixed, last",
    "ppo-gold/best": "gold reward (upper bound), handed back",
    "ppo-gold/last": "gold reward (upper bound), last",
    "ppo-gold-labelled/best": "gold reward on labelled rows only, handed back",
    "ppo-gold-labelled/last": "gold reward on labelled rows only, last",
    "sft-best-of": "SFT on unlabelled rows answered by best-of-8",
    "best-of": "best-of-8",
    "choice": "the reward model's own choice",
    "tfidf": "TF-IDF with logistic regression",
}

# What a pretrained model is measured by; --methods chooses others. Each costs minutes of a GPU.
OF_LLM = ("sft-label", "sft", "ppo-rationale", "ppo-label", "ppo-mixed", "tfidf")

# ---- settings --------------------------------------------------------------------------------------------------------

LABELLED = {"mrpc": 2400}  # rows with a label; 4,000 for every other task
TASKS = ("mr", "app_reviews", "sst2", "stsb", "mrpc", "qqp", "mnli", "agnews")
EVERY_STAGE = "--max_new_tokens 40 --save_every 0 --log_every 1000"  # a rationale and its label take 12 to 30 tokens


@dataclass(frozen=True)
class Settings:
    """Flags of each stage, beside data, seed and models.

    With a tiny model and the labelled rows above, a cell fits 30 minutes of one core.
    """

    tiny: str = "--hidden_size 128 --heads 4 --layers 2 --vocabulary 6000 --context 192 --epochs 1"
    sft: str = "--epochs 8 --show 0"  # dev's plateau on the tuning seeds, where four passes stop on their way up
    rm: str = "--epochs 1 --patience 3 --pairs_per_row 1 --samples_per_row 4 --dropout 0"
    rationale_rm: str = "--epochs 2 --patience 5 --samples_per_row 4"  # it has about half as many pairs
    ppo: str = (
        "--steps 45 --rollout_prompts 128 --minibatches 16 --ppo_epochs 2 --learning_rate 2e-4 "
        "--value_learning_rate 1e-3 --warmup 0.1 --eval_every 15 --show_every 1000"
    )
    best_of: str = "--epochs 2 --show 0"  # SFT on the answers that best-of-n chose

    def with_more(self, **more):
        """These flags with further ones, which override them."""
        return replace(self, **{name: f"{getattr(self, name)} {flags}".strip() for name, flags in more.items()})


SHORT = Settings()  # texts of 9 words
LONGER = SHORT.with_more(  # of 18 to 30
    sft="--eval_rows 500",
    rm="--samples_per_row 2",
    rationale_rm="--samples_per_row 2",
    ppo="--steps 30 --eval_every 10 --eval_rows 500",
)
LONGEST = LONGER.with_more(ppo="--steps 24 --eval_every 8")  # of 30 to 40
SETTINGS = dict.fromkeys(TASKS, LONGER) | {"sst2": SHORT, "mnli": LONGEST, "mrpc": LONGEST}
# a news item's first 30 words say what it is about, and four passes reach its plateau
SETTINGS["agnews"] = LONGEST.with_more(tiny="--context 96", sft="--epochs 4")
LLM = Settings(  # of a pretrained model; rates are the product's defaults
    sft="--epochs 3 --show 0 --batch_size 32 --eval_rows 500",
    rm="--epochs 1 --patience 3 --pairs_per_row 1 --samples_per_row 4 --batch_size 32",
    rationale_rm="--epochs 1 --patience 3 --samples_per_row 4 --batch_size 32",
    ppo="--steps 60 --rollout_prompts 64 --warmup 0.1 --eval_every 15 --eval_rows 500 --show_every 1000",
)
QUICK = {  # only to see that everything runs
    "tiny": "--hidden_size 48 --heads 2 --layers 2 --vocabulary 600 --epochs 4 --batch_size 16",
    "sft": "--epochs 20 --eval_every 10 --batch_size 8 --learning_rate 1e-2",
    "rm": "--epochs 1 --preview_rows 20 --preview_samples 8 --statistics_prompts 64",
    "rationale_rm": "--epochs 1 --statistics_prompts 64",
    "ppo": "--steps 4 --rollout_prompts 8 --eval_every 2",
    "best_of": "--epochs 1 --batch_size 8",
}
QUICK_LABELLED = 100


def settings_of(args):
    """The settings of a cell: the task's or a pretrained model's, changed by what the flags ask for."""
    settings = SETTINGS[args.task] if args.model == "tiny" else LLM
    if args.quick:
        settings = settings.with_more(**QUICK)
    if args.tune:
        settings = settings.with_more(sft=args.sft, rm=args.rm, ppo=args.ppo)
    return settings


# ---- the stages of a cell --------------------------------------------------------------------------------------------


class Cell(Stages):
    """Where the files of one cell are, and its stages as processes."""

    def __init__(self, args):
        self.args, self.settings = args, settings_of(args)
        self.data = Path(args.data).resolve() / args.task
        runs = Path(args.runs).resolve() / (args.task + "-quick" * args.quick)  # shared by the task's cells
        super().__init__(runs, CODE)
        model = Path(args.model).name + "-all" * args.all_labelled
        self.name = f"{args.task}-{model}-{args.seed}"
        self.directory = self.runs / self.name
        self.labelled = QUICK_LABELLED if args.quick else LABELLED.get(args.task, 4000)
        self.precision = ["--precision", args.precision] if args.precision else []

    def script(self, name, script, *words):
        """Run a script of the product, or one of quality_stages.py, into <cell>/<name>."""
        words = [*words, *(EVERY_STAGE.split() if script.startswith("train_") else [])]
        self.stage(self.directory / name, ROOT / script, *words, *self.precision, "--seed", self.args.seed)

    def together(self, *calls):
        """Make calls that need nothing of each other, --jobs at once."""
        with ThreadPoolExecutor(self.args.jobs) as pool:
            try:
                for call in [pool.submit(call) for call in calls]:
                    call.result()
            except BaseException:  # a stage that failed, or Ctrl-C: what has not begun does not begin
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def wants(self, *methods):
        return any(method in self.args.methods for method in methods)

    def as_typed(self, words):
        """A command line without this machine's paths."""
        typed = " ".join(["python", *words])
        for place, name in ((self.runs.parent, "runs/"), (self.data.parent, "data/"), (ROOT, "")):
            typed = typed.replace(f"{place}/", name)
        return typed.replace(str(Path(self.args.model).resolve()), Path(self.args.model).name)


def run_stages(cell):
    """Every stage that the cell's methods need, in order."""
    args, settings, path = cell.args, cell.settings, cell.directory
    data, base = prepare(cell)
    sft_data = data + ([] if args.all_labelled else ["--labelled", cell.labelled])
    sft = ["train_sft.py", "--model", base, *sft_data, *settings.sft.split()]
    label_only = [partial(cell.script, "sft-label", *sft, "--answer_format", "label")] * cell.wants("sft-label")
    cell.together(partial(cell.script, "sft", *sft), *label_only)
    policy = ["--policy", path / "sft"]
    rms = {"rm-label": ["--pairs", "label", *policy, *settings.rm.split()]}
    if cell.wants("ppo-rationale", "ppo-mixed"):
        rms["rm-rationale"] = ["--pairs", "rationale", *policy, *settings.rationale_rm.split()]
    cell.together(*(partial(cell.script, name, "train_rm.py", *words) for name, words in rms.items()))
    label, rationale = ["--label_rm", path / "rm-label"], ["--rationale_rm", path / "rm-rationale"]
    as_rllr = ["--reward", "gold", "--value_init", path / "rm-label"]  # so that only the reward differs
    rewards = {
        "ppo-rationale": ["--reward", "rationale", *rationale],
        "ppo-label": ["--reward", "label", *label],
        "ppo-mixed": ["--reward", "mixed", *label, *rationale],
        "ppo-gold": as_rllr,
        "ppo-gold-labelled": [*as_rllr, "--prompts", "labelled"],
    }
    if args.all_labelled:  # the labelled rows are the prompts already
        del rewards["ppo-gold-labelled"]
    ppo = ["train_ppo.py", *policy, *settings.ppo.split()]
    own = ["benchmarks/quality_stages.py", *policy, *label]
    scripts = [partial(cell.script, name, *ppo, *reward) for name, reward in rewards.items() if cell.wants(name)]
    scripts += [partial(cell.script, "choice", *own, "--make", "choice")] * cell.wants("choice")
    if cell.wants("tfidf") and util.find_spec("sklearn"):
        scripts.append(partial(cell.script, "tfidf", *own, "--make", "tfidf"))
    cell.together(*scripts)
    if cell.wants("sft-long"):
        cell.script("sft-long", *sft, *longer_sft(settings.sft.split(), cell))
    if cell.wants("sft-best-of"):
        steps = read(path / "ppo-label" / "last" / "rllr.json")["step"]
        answers = steps * number_of(settings.ppo.split(), "--rollout_prompts")
        cell.script("best-of-rows", *own, "--make", "rows", "--answers", answers, "--best_of", BEST_OF)
        config = read(path / "sft" / "rllr.json")["config"]
        start = ["--model", path / "best-of-rows" / "policy", *data]
        start += ["--train_file", path / "best-of-rows" / "rows.jsonl"]
        start += ["--held_out", "0.001", "--rationales", "given"]  # held-out rows would only serve a reward model
        start += ["--dropout", config["dropout"], "--learning_rate", config["learning_rate"]]
        cell.script("sft-best-of", "train_sft.py", *start, *settings.best_of.split())
    evaluate = ["-m", "rllr.evaluate", "--part", "eval" if args.tune else "test", *EVERY_STAGE.split()[:2]]
    evaluate += cell.precision
    models = [path / name for name in policies(cell)]
    answer = [partial(cell.stage, path / "evaluation", *evaluate, "--models", *models)]
    best_of = ["--models", path / "sft", "--best_of", BEST_OF, *label, "--seed", args.seed]
    answer += [partial(cell.stage, path / "best-of", *evaluate, *best_of)] * cell.wants("best-of")
    cell.together(*answer)


def policies(cell):
    """The methods of a cell that are one policy, as their directories are called."""
    own = ("best-of", "choice", "tfidf")
    return [name for name in METHODS if name not in own and name.partition("/")[0] in cell.stages]


def prepare(cell):
    """(data flags of every stage, the model that SFT starts from).

    No stage is told of the reporting half where settings are tuned. A tiny model is built once a task, whatever the
    seed and whatever is reported; cells of a task may start together, so one waits for the other.
    """
    args = cell.args
    cell.runs.mkdir(parents=True, exist_ok=True)
    with open(cell.runs / "prepare.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        choose, report = halve(cell.data / "dev.jsonl", cell.runs, 40 if args.quick else None)
        train = cell.data / "train.jsonl"
        if args.quick:
            lines = train.read_text(encoding="utf-8").splitlines(keepends=True)
            train = cell.runs / "train.jsonl"
            train.write_text("".join(lines[: 4 * QUICK_LABELLED]), encoding="utf-8")
        data = ["--task", args.task, "--train_file", train, "--eval_file", choose]
        base = Path(args.model).resolve()
        if args.model == "tiny":
            base = cell.runs / "tiny"
            cell.stage(base, "-m", "rllr.tiny", *data, "--test_share", "0", *cell.settings.tiny.split())
    return data + (["--test_share", "0"] if args.tune else ["--test_file", report]), base


def halve(dev_file, directory, most=None):
    """(file for choosing, file for reporting): the parity of a hash of the id divides the rows; `most` of each."""
    parts = directory / "dev_choose.jsonl", directory / "dev_report.jsonl"
    lines = [line for line in dev_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    for part, path in enumerate(parts):
        kept = [line for line in lines if hashlib.sha256(json.loads(line)["id"].encode()).digest()[0] % 2 == part]
        path.write_text("\n".join(kept[:most]) + "\n", encoding="utf-8")
    return parts


# ---- what a cell tells -----------------------------------------------------------------------------------------------


def describe(cell):
    """The cell as its file holds it. Labels are places in `labels`, a character a row, `-` for a parse failure."""
    args, path = cell.args, cell.directory
    task, examples = load_rows(args.task, cell.runs / ("dev_choose.jsonl" if args.tune else "dev_report.jsonl"))
    places = {label: str(place) for place, label in enumerate(task.labels)}
    methods = {}
    for name, file in answer_files(cell).items():
        answers = read_answers(file, examples)
        given = "".join(places.get(answer.label, "-") for answer in answers)
        methods[name] = {"labels": given, **measure(task, examples, answers)}
    return {
        "task": args.task,
        "model": Path(args.model).name,
        "seed": args.seed,
        "all_labelled": args.all_labelled,
        "labelled": None if args.all_labelled else cell.labelled,
        "part": "the choosing half" if args.tune else "the reporting half",
        "labels": list(task.labels),
        "gold": "".join(places[example.label] for example in examples),
        "texts": " ".join(map(text_key, examples)),
        "methods": methods,
        "reward_models": {
            kind: reward_model(path / f"rm-{kind}") for kind in ("label", "rationale") if f"rm-{kind}" in cell.stages
        },
        "preview": read(path / "rm-label" / "rllr.json")["report"]["preview"],
        "ppo": {name: handed_back(path / name) for name in cell.stages if name.startswith("ppo-")},
        "stages": cell.stages,
        "commit": cell.commits(),
        "machine": machine() | card(),
    }


def card():
    """The GPU, if there is one."""
    import torch

    return {"card": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}


def load_rows(task, file):
    """(task, rows of a file)."""
    from rllr.data.rows import load_examples
    from rllr.tasks import load_task

    task = load_task(task)
    return task, load_examples(str(file), task, log=lambda line: None)


def text_key(example):
    """8 hexadecimal digits of a row's texts, letters and digits only: equal texts of two tasks are found by it."""
    text = "\n".join("".join(filter(str.isalnum, (t or "").casefold())) for t in (example.text, example.text_b))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def answer_files(cell):
    """{method: the file of its answers}."""
    path = cell.directory
    found = {name: path / "evaluation" / f"answers-{n}.jsonl" for n, name in enumerate(policies(cell))}
    own = {name: path / name / "answers-0.jsonl" for name in ("choice", "tfidf") if name in cell.stages}
    if "best-of" in cell.stages:
        own["best-of"] = path / "best-of" / "answers-1.jsonl"  # the greedy answers are the first
    return {name: (found | own)[name] for name in METHODS if name in found | own}


def read_answers(file, examples):
    """The answers of a file, which must be to these rows."""
    from rllr.answers import Answer

    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if [line["id"] for line in lines] != [example.id for example in examples]:
        sys.exit(f"{file}: answers to other rows than those of the cell; remove its directory and run it again")
    return [Answer(line["answer"], line["label"], line["truncated"]) for line in lines]


def measure(task, examples, answers):
    """Accuracy, macro F1, parse failures; Pearson where labels are a scale, `grounded` where there are rationales."""
    from rllr.metrics import answer_metrics

    wanted = ("accuracy", "macro_f1", *["pearson"] * task.ordinal)
    found = answer_metrics(replace(task, metric="accuracy", metrics=wanted), examples, answers)
    return {name: round(value, 5) for name, value in found.items()}


def reward_model(directory):
    """What a reward model's record says of it, the preview apart, and how many pairs it saw."""
    report = {name: value for name, value in read(directory / "rllr.json")["report"].items() if name != "preview"}
    steps = json.loads((directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"]
    return report | {"pairs_seen": steps * read(directory / "rllr.json")["config"]["batch_size"]}


def handed_back(directory):
    """What PPO's records say: steps done, the step handed back (0: the start), steps where the guard saw hacking."""
    best, last = (read(directory / name / "rllr.json") for name in ("best", "last"))
    facts = {"steps": last["step"], "planned": last["config"]["steps"], "handed_back": best["step"]}
    return facts | {"hacking": last.get("hacking", []), "against_start": best.get("against_start")}


# ---- the command -----------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="directory with <task>/train.jsonl and <task>/dev.jsonl")
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--seed", type=int, required=True, help=f"of every stage; from {FIRST_TUNING_SEED} on to tune")
    parser.add_argument("--model", default="tiny", help="tiny, or a model's directory")
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="some of the methods alone, as their stages are called"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="of every stage, as in the scripts")
    parser.add_argument("--jobs", type=int, default=1, help="stages of the cell that run at once, where they may")
    parser.add_argument("--runs", default="runs/quality", help="directory of the models, logs and cells to tune by")
    parser.add_argument("--all_labelled", action="store_true", help="all rows are labelled, as without --labelled")
    parser.add_argument("--tune", action="store_true", help="figures of the choosing half, to choose settings by")
    parser.add_argument("--sft", default="", help="with --tune: further flags of train_sft.py")
    parser.add_argument("--rm", default="", help="with --tune: further flags of train_rm.py --pairs label")
    parser.add_argument("--ppo", default="", help="with --tune: further flags of train_ppo.py")
    parser.add_argument("--quick", action="store_true", help="few rows and steps: does everything run?")
    args = parser.parse_args(argv)
    if args.tune != (args.seed >= FIRST_TUNING_SEED):
        parser.error(f"--seed {args.seed}: seeds from {FIRST_TUNING_SEED} on are for --tune, the others for reports")
    if (args.sft or args.rm or args.ppo) and not args.tune:
        parser.error(
            "--sft, --rm and --ppo change settings: give them with --tune, and write what is best into SETTINGS"
        )
    known = tuple(dict.fromkeys(name.partition("/")[0] for name in METHODS))
    args.methods = args.methods or (known if args.model == "tiny" else OF_LLM)
    if unknown := set(args.methods) - set(known):
        parser.error(f"--methods {' '.join(sorted(unknown))}: choose from {', '.join(known)}")
    if missing := {"sft", "ppo-label"} - set(args.methods):
        parser.error(f"--methods: {' and '.join(sorted(missing))} must be there, which every table compares")
    for name in ("train", "dev"):
        file = Path(args.data) / args.task / f"{name}.jsonl"
        if not file.is_file():
            parser.error(f"--data {args.data}: {file} is not there")
    if "tfidf" in args.methods and not args.quick and not util.find_spec("sklearn"):
        parser.error('--methods tfidf needs scikit-learn: pip install ".[bench]"')
    return args


def file_of(cell):
    """The file that a cell is written to."""
    args = cell.args
    directory = cell.runs.parent / "cells" if args.tune or args.quick else CELLS
    return directory / f"{cell.name}{'-quick' * args.quick}.json"


def main(argv=None):
    args = parse(argv)
    cell = Cell(args)
    file = file_of(cell)
    kept = {name.partition("/")[0] for name in read(file)["methods"]} if file.exists() else set()
    if lost := kept - set(args.methods):
        sys.exit(f"{file} has methods that this run has not: {', '.join(sorted(lost))}; run with them, or remove it")
    run_stages(cell)
    file.parent.mkdir(parents=True, exist_ok=True)
    found = describe(cell)
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, method in found["methods"].items():
        print(
            f"{METHODS[name]:50} accuracy {100 * method['accuracy']:.1f} %  macro F1 {100 * method['macro_f1']:.1f} %"
        )
    minutes = sum(done["cpu_seconds"] for name, done in cell.stages.items() if name != "tiny") / 60
    print(f"{minutes:.1f} minutes of one core, the tiny model apart; written to {file}")


if __name__ == "__main__":
    main()
