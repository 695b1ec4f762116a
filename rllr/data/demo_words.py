"""The words of the demo data: sentence templates, opinion phrases, products and aspects. See `rllr.data.demo`."""

# Equally common. {D} is the deciding statement, {C} the conceded one; {Cn} is the latter as a noun phrase.
CONSTRUCTIONS: dict[str, str] = {
    "but": "{C}, but {D}",
    "although": "although {C}, {D}",
    "although-last": "{D}, although {C}",
    "despite": "despite {Cn}, {D}",
    "outweighs": "{D}, and that outweighs {Cn}",
}

OPENERS = (
    "honestly, ",
    "in my experience, ",
    "so far, ",
    "overall, ",
    "for what it is worth, ",
    "about this {}: ",
    "my verdict on this {}: ",
    "i ordered this {} online: ",
    "i bought this {} last month: ",
    "my second {} now: ",
    "a word on this {}: ",
    "we tried this {} at home: ",
)
ADJECTIVE_NEGATIONS = (
    "not exactly {}",
    "hardly {}",
    "far from {}",
    "anything but {}",
    "by no means {}",
    "not at all {}",
)
VERB_NEGATIONS = ("{do} not {base}", "{do} not really {base}", "never {verb}", "rarely {verb}", "hardly ever {verb}")
ADJECTIVE_MODIFIERS = ("really {}", "truly {}", "rather {}", "quite {}", "fairly {}")
VERB_MODIFIERS = ("really {verb}", "always {verb}", "usually {verb}", "often {verb}")

# Opinion phrases by the kind of aspect; those of "any" fit every aspect. A phrase follows "is" or "are"; ~ marks a verb
# phrase in its base form: "~die quickly" (dies, die).
NEGATIVE = {
    "look": "dim, blurry, grainy, washed out, pale, fuzzy, hard to make out, murky, distorted, dreadful,"
    "~flicker at night, ~wash out in sunlight, ~lose detail in the dark, "
    "~look flat, ~strain the eyes,~fade at the edges",
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
    "a breeze, ~load instantly, ~run smoothly, ~respond at once, ~make sense "
    "right away, ~save me time,~keep things simple",
    "comfort": "comfortable, soft, plush, cosy, supportive, ergonomic, kind to the skin, a pleasure to touch, snug,"
    "~feel gentle, ~fit like a glove, ~adapt to my shape, ~ease my aches, "
    "~cushion every bump, ~spare my back,padded just right",
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

# Aspects of each product as noun/kind. * marks a plural noun ("the speakers are"), - a noun without article
# ("software").
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
