"""docs/ppo-by-hand.md: every number on the page, its equations, and the functions that it names agree.

The page's tables are the input: words, sequences, weights, values, scores, settings. From these the step is computed
twice, in plain Python (`by_hand`) and by rllr (`by_rllr`). Each block of the page begins with an equation; a line below
it must be that equation with the numbers of its token put in, to the digit, and the equation itself, with unrounded
numbers, must give the result.
"""

import math
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_teaching import run_doctests
from torch import nn

import train_ppo
from rllr.layout import pack_sequences, response_positions, response_tokens
from rllr.logprobs import token_logprobs
from rllr.ppo import gae, kl_estimate, masked_whiten, policy_loss, value_loss
from rllr.rewards import label_sensitive_reward, shape_rewards

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "ppo-by-hand.md").read_text(encoding="utf-8")
ANSWERS, TIMES = "ab", range(2)
TOKENS = [f"{answer}{t}" for answer in ANSWERS for t in TIMES]  # a0 a1 b0 b1
HALF = 0.5e-4 + 1e-9  # half of the last of the four decimals that are printed


# ---- reading the page ------------------------------------------------------------------------------------------------


def tables():
    """Every table as {first cell of a row: its other cells}; the head is the row "head"."""
    found = []
    for block in re.findall(r"(?m)(?:^\|.*\n)+", PAGE):
        rows = [
            [cell.strip().replace("\\", "").strip("`") for cell in line.split("|")[1:-1]]
            for line in block.split("\n")
            if line
        ]
        found.append({"head": rows[0]} | {row[0]: row[1:] for row in rows[2:]})
    return found


def table(first, head=None):
    """The rows of the one table whose head begins with this cell. AssertionError where the head is not `head`."""
    (one,) = [table for table in tables() if table["head"][0] == first]
    assert head is None or one["head"][1:] == head
    return {name: cells for name, cells in one.items() if name != "head"}


def equations():
    """Of every block of text: (name, its forms, [(token or "", [numbers put in, ...], result)])."""
    found = []
    for block in re.findall(r"(?ms)^```text\n(.*?)^```", PAGE):
        lines = [" ".join(line.split()) for line in block.splitlines() if line.strip()]
        name, *forms = lines[0].split(" = ")
        if lines[1].startswith("="):  # one number for all tokens: a line each for the numbers and the result
            rows = [("", [line.removeprefix("= ") for line in lines[1:-1]], lines[-1].removeprefix("= "))]
        else:
            rows = []
            for line in lines[1:]:
                token, _, rest = line.partition(": ")
                *numbers, result = rest.split(" = ")
                rows.append((token, numbers, result))
        found.append((name, forms, rows))
    return found


def prose():
    """The page without its blocks, tables and links."""
    text = re.sub(r"(?ms)^```.*?^```", "", PAGE)
    return re.sub(r"\]\([^)]*\)|(?m:^\|.*$)", "", text)


# ---- the step, twice -------------------------------------------------------------------------------------------------


def inputs():
    """What the page gives: as plain Python lists, by answer and t."""
    ids = {word: int(cells[0]) for word, cells in table("word").items()}
    sequences = [[ids[word] for word in table("position")[f"answer {a}"]] for a in ANSWERS]
    weights = {}  # {model: {id that is read: weights of the next token}}
    for row, cells in table("model reads").items():
        model, _, word = row.partition(", ")
        weights.setdefault(model, {})[ids[word]] = [float(cell.removeprefix("log ")) for cell in cells]
    values = {ids[word]: [float(cell) for cell in cells] for word, cells in table("value model reads").items()}
    settings = {name: float(cells[0]) for name, cells in table("setting").items()}
    scores = [float(table("answer")[a][1]) for a in ANSWERS]
    prompt = [ids[word] for word in re.search(r"prompt is `([\w ]+)`", PAGE)[1].split()]
    return SimpleNamespace(
        ids=ids, sequences=sequences, weights=weights, values=values, scores=scores, prompt=prompt, **settings
    )


def by_hand():
    """{name: value or {token: value}} in plain Python, one token at a time."""
    given = inputs()
    per_token, one = {}, {name: getattr(given, name) for name in ("beta", "gamma", "lam", "eps")}
    one["prompt_len"] = len(given.prompt)

    def note(token, **named):
        for name, value in named.items():
            per_token.setdefault(name, {})[token] = value

    for answer, sequence, score in zip(ANSWERS, given.sequences, given.scores):
        for t in TIMES:
            place, token = len(given.prompt) - 1 + t, f"{answer}{t}"
            read, written = sequence[place], sequence[place + 1]
            note(token, t=t, position=place, score=score, last=int(t == max(TIMES)))
            note(token, V=given.values[read][0], V_new=given.values[read][1])
            for model, weight, name in (("policy", "w", ""), ("reference", "u", "ref_"), ("new policy", "n", "new_")):
                row = given.weights[model][read]
                probability = row[written] / sum(row)
                note(token, **{weight: row[written]}, **{f"{weight}_{i}": number for i, number in enumerate(row)})
                note(token, **{f"{name}pi": probability, f"{name}logp": math.log(probability)})
            x = per_token["ref_logp"][token] - per_token["logp"][token]
            note(token, kl=-x, k3=math.exp(x) - 1 - x)
            note(token, r=given.beta * x + (score if t == max(TIMES) else 0.0))
        next_value = next_advantage = 0.0
        for t in reversed(TIMES):
            token = f"{answer}{t}"
            reward, value = per_token["r"][token], per_token["V"][token]
            delta = reward + given.gamma * next_value - value
            advantage = delta + given.gamma * given.lam * next_advantage
            note(token, V_next=next_value, A_next=next_advantage, delta=delta, A=advantage)
            note(token, **{"return": advantage + value})
            next_value, next_advantage = value, advantage

    pi, advantages, number = per_token["pi"], list(per_token["A"].values()), len(TOKENS)
    one["mean_k1"], one["mean_k3"] = (sum(pi[f"{a}0"] * per_token[k][f"{a}0"] for a in ANSWERS) for k in ("kl", "k3"))
    one["mean"] = sum(advantages) / number
    one["variance"] = sum((advantage - one["mean"]) ** 2 for advantage in advantages) / (number - 1)
    for token in TOKENS:
        whitened = (per_token["A"][token] - one["mean"]) / math.sqrt(one["variance"] + 1e-8)
        rho = math.exp(per_token["new_logp"][token] - per_token["logp"][token])
        unclipped, clipped = -whitened * rho, -whitened * min(max(rho, 1 - given.eps), 1 + given.eps)
        passes = int(unclipped >= clipped)
        note(token, d=per_token["A"][token] - one["mean"], whitened=whitened, rho=rho, unclipped=unclipped)
        note(token, clipped=clipped, L=max(unclipped, clipped), passes=passes)
        note(token, slope=unclipped * passes / number)
        old, new, target = (per_token[name][token] for name in ("V", "V_new", "return"))
        errors = (new - target) ** 2, (min(max(new, old - given.eps), old + given.eps) - target) ** 2
        note(token, unclipped_error=errors[0], clipped_error=errors[1], E=max(errors))
    one["policy_loss"] = sum(per_token["L"].values()) / number
    one["clipfrac"] = sum(not passes for passes in per_token["passes"].values()) / number
    one["value_loss"] = sum(per_token["E"].values()) / 2 / number
    one["value_clipfrac"] = (
        sum(per_token["clipped_error"][k] > per_token["unclipped_error"][k] for k in TOKENS) / number
    )
    one["outside"] = sum(abs(rho - 1) > given.eps + 1e-12 for rho in per_token["rho"].values()) / number
    return per_token | one


class Table(nn.Module):
    """A language model whose logits depend on the token that it has just read: `token_logprobs` takes it as one."""

    config = None

    def __init__(self, weights, size):
        super().__init__()
        self.head = nn.Linear(size, size, bias=False, dtype=torch.float64)
        rows = torch.tensor([weights.get(read, [1.0] * size) for read in range(size)], dtype=torch.float64)
        self.head.weight = nn.Parameter(rows.log().T)

    def forward(self, input_ids, use_cache):
        hidden = nn.functional.one_hot(input_ids, self.head.in_features).to(self.head.weight.dtype)
        return SimpleNamespace(last_hidden_state=hidden)

    def get_output_embeddings(self):
        return self.head


def by_rllr():
    """The same quantities by rllr's functions, where it has one for them."""
    given, found = inputs(), {}
    length, size = len(given.prompt), len(given.ids)
    packed = pack_sequences([s[:length] for s in given.sequences], [s[length:] for s in given.sequences])
    mask, positions = packed.response_mask, response_positions(packed.prompt_lens, packed.response_mask)
    found["position"] = positions
    read = packed.sequences.gather(1, positions).tolist()
    values, new_values = (
        torch.tensor([[given.values[i][column] for i in row] for row in read], dtype=torch.float64) for column in (0, 1)
    )
    for model, name in (("policy", "logp"), ("reference", "ref_logp"), ("new policy", "new_logp")):
        found[name] = token_logprobs(Table(given.weights[model], size), *packed).detach()
    logprobs, ref_logprobs, new_logprobs = found["logp"], found["ref_logp"], found["new_logp"]
    found["kl"], found["k3"] = (kl_estimate(logprobs, ref_logprobs, kind) for kind in ("k1", "k3"))
    scores = label_sensitive_reward(torch.tensor(given.scores, dtype=torch.float64))
    found["r"] = rewards = shape_rewards(scores, logprobs, ref_logprobs, mask, given.beta)
    found["A"], found["return"] = advantages, returns = gae(rewards, values, mask, given.gamma, given.lam)
    found["whitened"] = whitened = masked_whiten(advantages, mask)

    def alone(x, mask):
        return x

    found["rho"] = (new_logprobs - logprobs).exp()
    found["L"] = policy_loss(new_logprobs, logprobs, whitened, mask, given.eps, reduce=alone)[0]
    moving = new_logprobs.clone().requires_grad_()
    loss, stats = policy_loss(moving, logprobs, whitened, mask, given.eps)
    (found["slope"],) = torch.autograd.grad(loss, moving)
    found["policy_loss"], found["clipfrac"] = loss.detach(), stats["clipfrac"]
    assert stats["ratio_mean"].item() == pytest.approx(found["rho"].mean().item(), abs=1e-12)
    found["E"] = 2 * value_loss(new_values, values, returns, mask, given.eps, reduce=alone)[0]
    found["value_loss"], stats = value_loss(new_values, values, returns, mask, given.eps)
    found["value_clipfrac"] = stats["clipfrac"]
    return found


HAND = by_hand()


def value_of(name, token=""):
    """The exact value of a name in an equation: `kl` of the line's token, or `kl_a0`, or a number of the whole step."""
    if name not in HAND:
        name, _, token = name.rpartition("_")
    return HAND[name][token] if isinstance(HAND[name], dict) else HAND[name]


def shown(value):
    """A number as the page prints it: at most four decimals."""
    text = f"{value:.4f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


# ---- the page against both -------------------------------------------------------------------------------------------


def test_rllr_agrees_with_plain_python():
    """Sign, index, order, divisor or clip of a function of ours."""
    found = by_rllr()
    assert len(found) == 18
    for name, tensor in found.items():
        expected = [[HAND[name][f"{a}{t}"] for t in TIMES] for a in ANSWERS] if tensor.dim() else HAND[name]
        torch.testing.assert_close(tensor.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


FUNCTIONS = {
    "exp": math.exp, "log": math.log, "sqrt": math.sqrt, "max": max,
    "clip": lambda x, low, high: min(max(x, low), high),
}  # fmt: skip
WORDS = re.compile(r"[A-Za-z_]\w*|\d+(?:\.\d+)?(?:e-?\d+)?|[-+*/^(),]")


def put_in(form, token, write):
    """An equation's right side with a number, as `write` prints it, in the place of every name."""
    parts, words = [], WORDS.findall(form)
    assert "".join(words) == form.replace(" ", ""), f"{form}: cannot be read"
    for i, word in enumerate(words):
        if word[0].isalpha() and word not in FUNCTIONS:
            text = write(value_of(word, token))
            after_operator, before_power = i and words[i - 1] in "+-*/", words[i + 1 : i + 2] == ["^"]
            word = f"({text})" if text.startswith("-") and (after_operator or before_power) else text
        parts.append(word)
    return "".join(parts)


def worth(text):
    """The value of an expression with numbers alone."""
    assert all(word in FUNCTIONS or not word[0].isalpha() for word in WORDS.findall(text)), text
    return eval(text.replace("^", "**"), {"__builtins__": {}}, FUNCTIONS)


EQUATIONS = equations()


@pytest.mark.parametrize("name, forms, rows", EQUATIONS, ids=[name for name, _, _ in EQUATIONS])
def test_block(name, forms, rows):
    """A number of the page that is not the one which its equation, its token and the page's tables give."""
    assert sorted(token for token, _, _ in rows) in ([""], TOKENS, [f"{a}0" for a in ANSWERS])
    for token, numbers, result in rows:
        exact = value_of(name, token)
        where = f"{name} {token}"
        assert result == shown(exact), f"{where}: the page says {result}, it is {shown(exact)}"
        assert abs(float(result) - exact) <= HALF
        assert len(numbers) == len(forms), where
        for form, written in zip(forms, numbers):
            expected = put_in(form, token, shown)
            assert written.replace(" ", "") == expected, f"{where}: the page says {written}, put in is {expected}"
            assert worth(put_in(form, token, repr)) == pytest.approx(exact, abs=1e-12), f"{where}: the equation"
            assert worth(written) == pytest.approx(exact, abs=3e-4), f"{where}: with the numbers as they are printed"


def test_the_blocks_are_the_whole_step():
    names = [name for name, _, _ in EQUATIONS]
    step = "position logp ref_logp kl k3 mean_k1 mean_k3 r delta A return mean d variance whitened"
    assert names == f"{step} new_logp rho L policy_loss slope E value_loss".split()
    assert sum(len(rows) for _, _, rows in EQUATIONS) == 4 * 16 + 6


def test_the_sheet():
    """The table that sums the step up."""
    rows = table("quantity", TOKENS)
    assert set(rows) == set("logp ref_logp kl r V delta A return whitened rho L V_new E".split())
    for name, cells in rows.items():
        assert cells == [shown(HAND[name][token]) for token in TOKENS], name


def test_the_settings_are_the_defaults():
    config = train_ppo.PPOConfig()
    for name, (value, flag) in table("setting").items():
        flags = re.findall(r"--(\w+)", flag)
        assert flags and all(getattr(config, flag) == float(value) for flag in flags), name
    assert config.kl_kind == "k1" and config.temperature == 1.0 and config.answers_per_prompt == 1


def test_the_answers_are_what_the_positions_say():
    given = inputs()
    table("position", [str(i) for i in range(len(given.sequences[0]))])
    table("model reads", list(given.ids))
    for answer, sequence in zip(ANSWERS, given.sequences):
        assert sequence[: len(given.prompt)] == given.prompt
        words = [word for id in sequence[len(given.prompt) :] for word, i in given.ids.items() if i == id]
        assert table("answer")[answer][0] == " ".join(words)
    assert sorted(given.ids.values()) == list(range(len(given.ids)))
    predicts = table("position")["predicts"]
    assert predicts == ["", *(f"t = {t}" for t in TIMES), ""]
    assert predicts.index("t = 0") == HAND["position"]["a0"]
    packed = pack_sequences([given.prompt] * 2, [s[len(given.prompt) :] for s in given.sequences])
    assert response_tokens(*packed).tolist() == [s[len(given.prompt) :] for s in given.sequences]


def test_no_number_of_the_prose_is_unchecked():
    """A decimal stands in the text as `name = number` alone, and is the number of that name."""
    text = prose()
    bound = re.findall(r"`(\w+) = (-?[\d.]+)`", text)
    assert len(bound) > 8
    for name, number in bound:
        assert number == shown(value_of(name)), name
    rest = re.sub(r"`\w+ = -?[\d.]+`", "", text)
    assert not re.findall(r"\d+\.\d+(?!\d*[/.]\d)", re.sub(r"arXiv:[\d.]+", "", rest))


def test_what_the_page_says_of_the_clip():
    """Four cases: beyond the bound and wanted (held back, both ways), inside, beyond the bound and not wanted."""
    assert [HAND["passes"][token] for token in TOKENS] == [0, 1, 0, 1]
    assert [abs(HAND["rho"][token] - 1) > HAND["eps"] for token in TOKENS] == [True, False, True, True]
    clipped = [token for token in TOKENS if HAND["clipped_error"][token] > HAND["unclipped_error"][token]]
    assert clipped == ["a1"] and "\na1 is clipped. Its value" in PAGE
    told = re.findall(r"(?m)^- (\w\d) has a (positive|negative) advantage", PAGE)
    assert told == [(token, "positive" if HAND["whitened"][token] > 0 else "negative") for token in TOKENS]
    idle = [token for token in TOKENS if not HAND["passes"][token]]
    assert f"{' and '.join(idle)} have no gradient" in " ".join(PAGE.split())
    for token, sign in re.findall(r"slope of (\w\d) is (positive|negative)", PAGE):
        assert (HAND["slope"][token] > 0) == (sign == "positive")


def test_the_acts_are_those_of_train_ppo():
    source = (ROOT / "train_ppo.py").read_text(encoding="utf-8")
    acts = re.findall(r"(?m)^## (\d \w+)$", PAGE)
    assert len(acts) == 6 and all(f"# {act.lower()}:" in source for act in acts)


def test_the_gradient_at_the_logits():
    """The page's words on a1 and a0: the token's logit up, the others down; nothing."""
    given = inputs()
    model = Table(given.weights["new policy"], len(given.ids))
    packed = pack_sequences([given.prompt] * 2, [s[len(given.prompt) :] for s in given.sequences])
    found = by_rllr()
    policy_loss(token_logprobs(model, *packed), found["logp"], found["whitened"], packed.response_mask)[0].backward()
    gradient = model.head.weight.grad.T  # [token that is read, logit]
    of_a1, end = gradient[given.ids["negative"]], given.ids["<eos>"]
    assert of_a1[end] < 0 and (of_a1[:end] > 0).all()  # descent goes against the gradient
    slope, pi = HAND["slope"]["a1"], HAND["new_pi"]["a1"]
    assert of_a1[end].item() == pytest.approx(slope * (1 - pi), abs=1e-12)
    assert not gradient[given.ids["so"]].any()  # a0 and b0 are both held by the clip


def test_the_doctests():
    """They print what the page says, from the numbers of the page's tables."""
    names, given = run_doctests("ppo-by-hand.md", 30), inputs()
    for name, model in (("policy", "policy"), ("reference", "reference"), ("new_policy", "new policy")):
        rows = [given.weights[model][read] for read in range(3)]
        torch.testing.assert_close(names[name].exp(), torch.tensor(rows, dtype=torch.float64))
    for name, quantity in (("values", "V"), ("new_values", "V_new")):
        assert names[name].flatten().tolist() == [HAND[quantity][token] for token in TOKENS]
    assert names["packed"].sequences.tolist() == given.sequences
    assert names["scores"].tolist() == given.scores


def test_the_figure_shows_the_pages_numbers():
    numbers = runpy.run_path(str(ROOT / "docs" / "figures" / "ppo_by_hand.py"))["numbers"]()
    assert set(numbers) == {"r", "V", "delta", "A"}
    for name, rows in numbers.items():
        flat = [number for row in rows for number in row]
        assert flat == pytest.approx([HAND[name][token] for token in TOKENS], abs=1e-12), name
