"""The built-in `demo` data: short product reviews written by a seeded grammar, so a run needs no file and no network.

    text       "although the screen is gorgeous, the battery dies quickly."
    label      negative
    rationale  "what decides is that the battery dies quickly, which is negative"

The rule. A review weighs two statements of opposite polarity and its grammar says which one decides:

    X, but Y.    although X, Y.    Y even though X.    X; still, Y.    despite X, Y.    Y despite X.
    Y, and that outweighs X.    X, but what counts is Y.    some say X; in truth, Y.    Y, even if some claim X.

Everywhere Y decides and X is conceded. The label is the polarity of Y: that of its opinion phrase, flipped by a
negation ("is far from dull" is positive, "never lets me down" too); "really", "rather" and the like change nothing.
Some reviews join a second statement of the same polarity to Y, or to X, with "and". So most words are about as common
under both labels: a reader has to know which statement decides *and* what its words mean.

The rationale for the gold label quotes Y's (first) statement word for word, the one for the wrong label quotes X's.

Splits. A *combination* is an unordered pair of opinion phrases that meet in one text ("die quickly", "gorgeous"),
whatever the product, the aspect, the construction, the order or the negation. Every combination belongs to one split,
so no pair of phrases in dev ever met in train or test. The single phrases are shared, most of them rare (Zipf).
"""

import random
import zlib
from bisect import bisect
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, combinations

from ..common.errors import InputError
from ..tasks import Example

# ---- Knobs, read at the first call. Harder: more phrases, a larger exponent, more negation, less support, more decoys.
SEED = 19763
SIZES = {"train": 20_000, "dev": 2_000, "test": 2_000}
PAIR_SHARES = {"dev": 0.2, "test": 0.2}  # of all combinations; train has the others
PHRASES_PER_KIND = 4  # of each polarity, for each of the 13 kinds of aspect (16 = all; more is harder)
GENERIC_SHARE = 0.12  # statements with a phrase that fits every aspect ("excellent", "lets me down")
ZIPF_TRAIN = 1.0  # the phrase of rank r has weight r ** -exponent; 0 makes all of a kind equally common
ZIPF_HELD_OUT = 1.0  # the same for dev and test; smaller than ZIPF_TRAIN asks more about the phrases rare in train
NEGATION_SHARE = 0.12  # statements with a negated phrase
MODIFIER_SHARE = 0.1  # of the statements without a negation: "really", "rather", "usually"
SUPPORT_SHARE = 0.55  # texts with a second statement on the deciding side; what a bag of words can live on
DECOY_SHARE = 0.03  # texts with a second statement on the conceded side; what a bag of words falls for
OPENER_SHARE = 0.1  # texts that begin with a filler
LABEL_NOISE = 0.0  # train rows whose label (and rationale) is the wrong one
MIN_WORDS, MAX_WORDS = 8, 24

LABELS = ("negative", "positive")

RATIONALE_START, RATIONALE_LINK = "what decides is ", ", which is "

# {D} is the deciding statement, {C} the conceded one; {Dn} and {Cn} are the same as noun phrases.
CONSTRUCTIONS = {  # name: (share, templates)
    "but": (3, ("{C}, but {D}", "{C}, yet {D}")),
    "although": (3, ("although {C}, {D}", "even though {C}, {D}", "while {C}, {D}")),
    "although-last": (3, ("{D}, although {C}", "{D} even though {C}", "{D}, even if {C}")),
    "still": (2, ("{C}; still, {D}", "{C}; however, {D}", "granted, {C}; all the same, {D}")),
    "despite": (2, ("despite {Cn}, {D}", "in spite of {Cn}, {D}")),
    "despite-last": (2, ("{D} despite {Cn}", "{D}, in spite of {Cn}")),
    "outweighs": (2, ("{D}, and that outweighs {Cn}", "{D}, which matters more than {Cn}")),
    "outweighed": (2, ("{C}, but what counts is {Dn}", "{C}, which matters less than {Dn}")),
    "claim": (1, ("some say that {C}; in truth, {D}", "friends told me that {C}, when in fact {D}")),
    "claim-last": (1, ("{D}, even if some claim that {C}", "{D}, although others say that {C}")),
}
SAME_ASPECT = ("claim", "claim-last")  # a claim is refuted by a statement about the same aspect

OPENERS = (
    "honestly, ", "in my experience, ", "so far, ", "overall, ", "for what it is worth, ", "about this {}: ",
    "my verdict on this {}: ", "i ordered this {} online: ", "i bought this {} last month: ", "my second {} now: ",
    "a word on this {}: ", "we tried this {} at home: ",
)  # fmt: skip
ADJECTIVE_NEGATIONS = (
    "not exactly {}", "hardly {}", "far from {}", "anything but {}", "by no means {}", "not at all {}",
)  # fmt: skip
VERB_NEGATIONS = ("{do} not {base}", "{do} not really {base}", "never {verb}", "rarely {verb}", "hardly ever {verb}")
ADJECTIVE_MODIFIERS = ("really {}", "truly {}", "rather {}", "quite {}", "fairly {}")
VERB_MODIFIERS = ("really {verb}", "always {verb}", "usually {verb}", "often {verb}")

# ---- Vocabulary. Phrases follow "is" or "are"; ~ marks a verb phrase in its base form: "~die quickly" (dies, die).
# The keys are the kinds of aspect; "any" fits them all.
NEGATIVE = {
    "look": "dim, blurry, grainy, washed out, pale, fuzzy, hard to make out, murky, distorted, dreadful,"
    "~flicker at night, ~wash out in sunlight, ~lose detail in the dark, ~look flat, ~strain the eyes,"
    "~fade at the edges",
    "power": "short-lived, feeble, useless in the cold, worn out already, erratic, ~die quickly, ~drain overnight,"
    "~take forever to charge, ~overheat, ~swell up, ~give out by noon, ~lose charge when idle, ~quit without warning,"
    "~need constant charging, ~run hot, ~fade within a year",
    "sound": "tinny, muffled, muddy, harsh, shrill, hollow, thin, piercing, full of static, ~crackle,"
    "~buzz at high volume, ~hiss, ~distort, ~cut out, ~hum all the time, ~hurt my ears",
    "build": "flimsy, brittle, wobbly, loose, fragile, badly glued, shoddy, crooked, ~crack easily, ~scratch easily,"
    "~creak, ~snap under pressure, ~fall apart, ~rattle, ~chip at the corners, ~come loose",
    "software": "clunky, sluggish, buggy, cluttered, laggy, baffling, full of ads, a maze, ~crash a lot, ~freeze,"
    "~lag behind, ~lose my settings, ~hide basic options, ~refuse to sync, ~hang at startup, ~drive me mad",
    "comfort": "stiff, lumpy, scratchy, cramped, itchy, painful, awkward, rock hard, ~dig in, ~pinch, ~chafe, ~slip,"
    "~leave sore spots, ~sag, ~hurt after an hour, ~make me sweat",
    "taste": "bitter, bland, stale, sour, burnt, watery, sickly, rancid, insipid, cloying, greasy,"
    "~taste of cardboard, ~leave a chemical aftertaste, ~turn my stomach, ~taste artificial, ~put me off",
    "service": "rude, slow, unhelpful, dismissive, careless, incompetent, evasive, arrogant, a disgrace,"
    "~ignore emails, ~keep me waiting, ~dodge every question, ~blame the buyer, ~hang up on callers,"
    "~give wrong answers, ~overcharge",
    "price": "steep, outrageous, inflated, excessive, absurd, extortionate, unfair, hard to justify, a rip-off,"
    "~sting, daylight robbery, ~keep climbing, ~exceed the value, ~insult buyers, ~break the bank, ~scare people off",
    "manual": "confusing, incomplete, vague, outdated, cryptic, misleading, illegible, badly translated,"
    "riddled with errors, a mess, ~skip key steps, ~make little sense, ~leave out the basics, ~confuse newcomers,"
    "~assume too much, ~raise more questions",
    "motor": "weak, noisy, unreliable, underpowered, deafening, temperamental, ~stall, ~jam, ~break down,"
    "~lose power, ~grind, ~struggle with basic jobs, ~smell of burning, ~give up halfway, ~shake the floor,"
    "~wake the neighbours",
    "story": "dull, predictable, wooden, tedious, shallow, silly, contrived, overlong, lifeless, a bore, ~drag on,"
    "~go nowhere, ~put me to sleep, ~fall flat, ~repeat old ideas, ~wear thin",
    "fabric": "drab, ugly, frayed, see-through, tacky, faded, garish, hideous, ~shrink in the wash, ~tear easily,"
    "~bleed dye, ~come undone, ~unravel, ~look cheap, ~wrinkle at once, ~pill after one wash",
    "any": "awful, terrible, poor, lousy, mediocre, second rate, pathetic, a letdown, ~disappoint, ~let me down,"
    "~fall short, ~annoy me",
}
POSITIVE = {
    "look": "gorgeous, crisp, vivid, sharp, bright, lifelike, stunning, brilliant, crystal clear, richly detailed,"
    "radiant, ~look true to life, ~pop in sunlight, ~catch every detail, ~wow everyone, easy on the eyes",
    "power": "dependable, long-lasting, strong, tireless, efficient, ~last for days, ~charge in minutes,"
    "~outlast the rest, ~hold a charge well, ~keep going all weekend, ~survive long trips, ~recover fast, ~sip power,"
    "~stay cool, ~carry me through the day, good for years",
    "sound": "rich, warm, balanced, clear, booming, punchy, full, lush, free of noise, ~fill the room,"
    "~sound natural, ~bring songs to life, ~carry well, ~give me goosebumps, immersive, music to my ears",
    "build": "solid, sturdy, rugged, tough, robust, well made, rock steady, durable, built to last, ~hold up well,"
    "~take a beating, ~survive drops, ~feel premium, ~resist scratches, ~shrug off knocks, ~stay in place",
    "software": "intuitive, responsive, snappy, polished, stable, seamless, bug free, uncluttered, easy to navigate,"
    "a breeze, ~load instantly, ~run smoothly, ~respond at once, ~make sense right away, ~save me time,"
    "~keep things simple",
    "comfort": "comfortable, soft, plush, cosy, supportive, ergonomic, kind to the skin, a pleasure to touch, snug,"
    "~feel gentle, ~fit like a glove, ~adapt to my shape, ~ease my aches, ~cushion every bump, ~spare my back,"
    "padded just right",
    "taste": "delicious, tasty, smooth, fragrant, mellow, heavenly, divine, scrumptious, full of flavour, a treat,"
    "~taste fresh, ~hit the spot, ~melt in the mouth, ~linger pleasantly, ~leave me wanting more,"
    "~please the whole family",
    "service": "friendly, helpful, polite, prompt, courteous, attentive, generous, professional, patient,"
    "trustworthy, ~go the extra mile, ~answer within minutes, ~solve problems fast, ~keep promises,"
    "~care about customers, a gem",
    "price": "fair, reasonable, affordable, modest, attractive, low, sensible, a bargain, a steal, easy to justify,"
    "~suit any budget, ~feel right, ~beat the rivals, ~leave money to spare, ~undercut the shops, ~tempt everyone",
    "manual": "thorough, readable, informative, concise, lucid, complete, well written, well illustrated,"
    "easy to follow, a model of clarity, ~explain every step, ~answer every question, ~guide beginners well,"
    "~get you started fast, ~spell everything out, ~cover all you need",
    "motor": "powerful, fast, quiet, reliable, unstoppable, mighty, quick, effortless, ~handle anything,"
    "~start first time, ~work like a charm, ~get the job done, ~deliver plenty of power, ~make light work of chores,"
    "~purr, ~finish in seconds",
    "story": "gripping, moving, witty, clever, touching, funny, memorable, original, charming, believable, a delight,"
    "~keep you guessing, ~ring true, ~draw you in, ~stay with you, ~make me laugh",
    "fabric": "elegant, stylish, flattering, breathable, silky, well sewn, handsome, chic, tasteful, a joy to wear,"
    "~wash well, ~look expensive, ~drape nicely, ~earn compliments, ~go with everything, ~feel luxurious",
    "any": "excellent, superb, impressive, outstanding, terrific, wonderful, first rate, a highlight, ~impress,"
    "~delight me, ~exceed expectations, ~earn full marks",
}

# An aspect is noun/kind; * marks a plural noun ("the speakers are"), - one without article ("software that crashes").
SHOP = " price/price seller/service"
DEVICE = SHOP + " manual/manual support_team/service"
PRODUCTS = {
    "phone": "screen/look battery/power speakers*/sound case/build menus*/software photos*/look" + DEVICE,
    "laptop": "display/look battery/power hinge/build software-/software speakers*/sound fan/motor" + DEVICE,
    "tablet": "screen/look battery/power app/software stand/build sound-/sound" + DEVICE,
    "camera": "pictures*/look viewfinder/look battery/power grip/comfort menus*/software" + DEVICE,
    "headset": "sound-/sound bass-/sound ear_pads*/comfort microphone/sound battery/power headband/build" + DEVICE,
    "smartwatch": "display/look battery/power strap/comfort app/software buckle/build" + DEVICE,
    "television": "picture/look sound-/sound remote/build menus*/software stand/build" + DEVICE,
    "radio": "speaker/sound display/look antenna/build battery/power" + DEVICE,
    "vacuum cleaner": "motor/motor battery/power handle/build hose/build" + DEVICE,
    "drill": "motor/motor battery/power grip/comfort case/build" + DEVICE,
    "blender": "motor/motor instructions*/manual jug/build lid/build smoothies*/taste" + DEVICE,
    "espresso machine": "pump/motor coffee-/taste water_tank/build cups*/build" + DEVICE,
    "lawn mower": "engine/motor handle/build wheels*/build grip/comfort" + DEVICE,
    "electric bike": "motor/motor battery/power saddle/comfort frame/build app/software" + DEVICE,
    "office chair": "seat/comfort armrests*/comfort frame/build wheels*/build cover/fabric instructions*/manual" + SHOP,
    "sofa": "cushions*/comfort legs*/build cover/fabric armrests*/comfort courier/service" + SHOP,
    "backpack": "straps*/comfort zippers*/build lining/fabric buckles*/build" + SHOP,
    "jacket": "fabric-/fabric lining/fabric sleeves*/fabric zipper/build collar/comfort" + SHOP,
    "dress": "fabric-/fabric sleeves*/fabric lining/fabric waistband/comfort" + SHOP,
    "novel": "plot/story characters*/story dialogue-/story ending/story cover_art-/look" + SHOP,
    "video game": "story/story characters*/story dialogue-/story graphics*/look controls*/software music-/sound" + SHOP,
    "pizza": "crust/taste sauce/taste toppings*/taste courier/service" + SHOP,
    "chocolate box": "filling/taste coating/taste pralines*/taste wrapping/build" + SHOP,
}


@dataclass(frozen=True)
class Review:
    """A generated text with all that is known of it. `deciding` and `conceded` are the words a rationale quotes."""

    text: str
    label: str  # by the rule, before any label noise
    construction: str
    combinations: frozenset[tuple[str, str]]  # every pair of opinion phrases in the text, each pair sorted
    deciding: str
    conceded: str


def demo_examples(split: str) -> list[Example]:
    """The rows of "train", "dev" or "test", the same in every run, each with a rationale for either label."""
    noise = random.Random(f"{SEED}-{split}-noise")
    rows = []
    for number, review in enumerate(reviews(split)):
        wrong = LABELS[1 - LABELS.index(review.label)]
        quotes = {review.label: review.deciding, wrong: review.conceded}
        rationales = {label: phrase_rationale(quotes[label], label) for label in LABELS}
        label = wrong if split == "train" and noise.random() < LABEL_NOISE else review.label
        rows.append(
            Example(
                id=f"demo-{split}-{number:06d}",
                text=review.text,
                label=label,
                rationale=rationales[label],
                rationales=rationales,
            )
        )
    return rows


def phrase_rationale(quote: str, label: str) -> str:
    """The rationale that rests on a quoted statement and argues for a label."""
    return f"{RATIONALE_START}{quote}{RATIONALE_LINK}{label}"


def quote_of(rationale: str) -> str:
    """The statement that a rationale of `phrase_rationale` quotes."""
    return rationale.removeprefix(RATIONALE_START).rpartition(RATIONALE_LINK)[0]


def reviews(split: str) -> list[Review]:
    """The generated texts behind `demo_examples(split)`: distinct, with both labels as common in each construction."""
    if split not in SIZES:
        raise InputError(f"the demo task has no split {split!r}; choose from {', '.join(SIZES)}")
    rng = random.Random(f"{SEED}-{split}")
    names, shares = list(CONSTRUCTIONS), [share for share, _ in CONSTRUCTIONS.values()]
    rows, seen, turns = [], set(), dict.fromkeys(names, 0)
    while len(rows) < SIZES[split]:
        name = rng.choices(names, shares)[0]
        draw = rng.random()
        sides = "DCD" if draw < SUPPORT_SHARE else "DCC" if draw < SUPPORT_SHARE + DECOY_SHARE else "DC"
        review = None
        while review is None or review.text in seen or not MIN_WORDS <= len(review.text.split()) <= MAX_WORDS:
            review = _review(rng, split, name, sides, polarity=turns[name] % 2)
        turns[name] += 1  # the labels take turns
        seen.add(review.text)
        rows.append(review)
    return rows


def _review(rng: random.Random, split: str, construction: str, sides: str, polarity: int) -> Review | None:
    """One text with label LABELS[polarity]; None where no combination of the split was found.

    `sides` has a letter for each statement: D for one on the deciding side, C on the conceded side.
    """
    product = rng.choice(list(PRODUCTS))
    aspects = rng.sample(PRODUCTS[product].split(), len(sides))
    if construction in SAME_ASPECT:
        aspects[1] = aspects[0]
    polarities = [polarity if side == "D" else 1 - polarity for side in sides]
    opinions = _opinions(rng, split, aspects, polarities)
    if opinions is None:
        return None

    clauses, noun_phrases = {"D": [], "C": []}, {"D": [], "C": []}
    for side, aspect, (phrase, negated) in zip(sides, aspects, opinions):
        clause, noun_phrase = _render(rng, aspect, phrase, negated)
        clauses[side].append(clause)
        noun_phrases[side].append(noun_phrase)
    template = rng.choice(CONSTRUCTIONS[construction][1])
    slots, quotes = {}, {}
    for side in "DC":
        slots[side], slots[f"{side}n"] = " and ".join(clauses[side]), " and ".join(noun_phrases[side])
        quotes[side] = noun_phrases[side][0] if f"{{{side}n}}" in template else f"that {clauses[side][0]}"
    opener = rng.choice(OPENERS).format(product) if rng.random() < OPENER_SHARE else ""
    phrases = [phrase for phrase, _ in opinions]
    return Review(
        text=f"{opener}{template.format(**slots)}.",
        label=LABELS[polarity],
        construction=construction,
        combinations=frozenset(tuple(sorted(pair)) for pair in combinations(phrases, 2)),
        deciding=quotes["D"],
        conceded=quotes["C"],
    )


def _opinions(rng: random.Random, split: str, aspects: list[str], polarities: list[int]) -> list | None:
    """A (phrase, negated) for each aspect, of these polarities after negation, any two a combination of the split."""
    chosen = []
    for aspect, polarity in zip(aspects, polarities):
        negated = rng.random() < NEGATION_SHARE
        kind = "any" if rng.random() < GENERIC_SHARE else aspect.split("/")[1]
        phrases, weights = _ranked_phrases(kind, polarity ^ negated, split)
        for _ in range(20):
            phrase = phrases[bisect(weights, rng.random() * weights[-1])]
            if all(_split_of(phrase, other) == split for other, _ in chosen):
                chosen.append((phrase, negated))
                break
        else:
            return None
    return chosen


@cache
def _ranked_phrases(kind: str, polarity: int, split: str) -> tuple[list[str], list[float]]:
    """The phrases of one kind and polarity, the most frequent first, with their cumulative Zipf weights."""
    phrases = [phrase.strip() for phrase in (NEGATIVE, POSITIVE)[polarity][kind].split(",")]
    random.Random(f"{SEED}-{kind}-{polarity}").shuffle(phrases)  # the tables list adjectives before verbs
    phrases = phrases[:PHRASES_PER_KIND]
    exponent = ZIPF_TRAIN if split == "train" else ZIPF_HELD_OUT
    return phrases, list(accumulate(rank**-exponent for rank in range(1, len(phrases) + 1)))


@cache
def _split_of(phrase: str, other: str) -> str | None:
    """The split that owns this combination, by a hash that is the same in every run; a phrase never meets itself."""
    if phrase == other:
        return None
    draw = zlib.crc32(" ".join((str(SEED), *sorted((phrase, other)))).encode()) / 2**32
    for split, share in PAIR_SHARES.items():
        if draw < share:
            return split
        draw -= share
    return "train"


def _render(rng: random.Random, aspect: str, phrase: str, negated: bool) -> tuple[str, str]:
    """One opinion as a clause, "the battery dies quickly", and as a noun phrase, "a battery that dies quickly"."""
    noun = aspect.split("/")[0].replace("_", " ")
    plural, uncountable = noun.endswith("*"), noun.endswith("-")
    noun = noun.rstrip("*-")
    is_verb, words = phrase.startswith("~"), phrase.lstrip("~")
    pattern = "{verb}" if is_verb else "{}"
    if negated:
        pattern = rng.choice(VERB_NEGATIONS if is_verb else ADJECTIVE_NEGATIONS)
    elif rng.random() < MODIFIER_SHARE and (is_verb or " " not in words):
        pattern = rng.choice(VERB_MODIFIERS if is_verb else ADJECTIVE_MODIFIERS)
    if is_verb:
        said = pattern.format(base=words, verb=words if plural else _third_person(words), do="do" if plural else "does")
        predicate = said
    else:
        said = pattern.format(words)
        predicate = f"{'are' if plural else 'is'} {said}"
    if not (is_verb or negated or " " in words):
        noun_phrase = f"the {said} {noun}"  # "the really gorgeous screen"
    else:
        article = "" if plural or uncountable else "an " if noun[0] in "aeiou" else "a "
        noun_phrase = f"{article}{noun} that {predicate}"
    return f"the {noun} {predicate}", noun_phrase


def _third_person(words: str) -> str:
    """ "die quickly" -> "dies quickly"."""
    verb, _, rest = words.partition(" ")
    if verb.endswith(("s", "sh", "ch", "x", "z", "o")):
        verb += "es"
    elif verb.endswith("y") and verb[-2] not in "aeiou":
        verb = f"{verb[:-1]}ies"
    else:
        verb += "s"
    return f"{verb} {rest}".rstrip()
