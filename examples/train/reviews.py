"""Reviews and their sentiment."""

import random

THINGS = {
    "train": "phone,hotel,blender,jacket,restaurant,novel,laptop,vacuum cleaner,camera,pizza,film,"
    "mattress,pair of shoes,tablet,concert,coffee machine,bus tour,desk,toothbrush,speaker",
    "heldout": "headset,museum,rucksack,café,watch,printer,bakery,sofa,video game,kettle",
}
PARTS = {
    "train": "quality,design,price,service,packaging,sound,battery,screen,taste,staff,story,room,"
    "food,view,material,delivery,handling,colour",
    "heldout": "menu,display,atmosphere,finish,support,breakfast,software,plot,comfort",
}
ADJECTIVES = {
    ("train", "positive"): "great,excellent,wonderful,lovely,superb,fantastic,beautiful,perfect,"
    "very good,brilliant,outstanding,delightful,impressive,top notch",
    ("heldout", "positive"): "amazing,awesome,terrific,first class,really nice,marvellous",
    ("train", "negative"): "terrible,awful,poor,bad,disappointing,horrible,dreadful,cheap and ugly,"
    "useless,disgusting,a joke,unacceptable,miserable,way too weak",
    ("heldout", "negative"): "lousy,shameful,pathetic,appalling,rubbish,very annoying",
    ("train", "neutral"): "okay,average,fine,acceptable,ordinary,standard,nothing special,so-so,"
    "neither good nor bad,as expected,decent enough,mediocre",
    ("heldout", "neutral"): "passable,fairly typical,all right,unremarkable,just normal",
}
SHAPES = {
    "train": (
        "The {part} is {adj}.",
        "The {part} was {adj}.",
        "I found the {part} {adj}.",
        "This {thing} is {adj}.",
        "The {part} of this {thing} is {adj}.",
        "For me the {thing} was {adj}.",
        "{Adj} {thing}.",
        "Overall {adj}.",
        "We thought the {part} was {adj}.",
    ),
    "heldout": (
        "What can I say, the {part} is {adj}.",
        "My impression of the {thing}: {adj}.",
        "{part}: {adj}.",
        "The {thing} turned out to be {adj}.",
        "In my opinion the {part} is {adj}.",
    ),
}
WHOLE = {
    ("train", "positive"): (
        "I love it!",
        "I love this {thing}.",
        "Best {thing} I have ever had.",
        "It works like a charm.",
        "I would buy it again at once.",
        "Highly recommended.",
        "Five stars from me.",
        "We enjoyed every minute.",
        "It makes me happy every day.",
        "I am so glad I chose this {thing}.",
        "Worth every cent.",
        "The {part} exceeded all my hopes.",
        "My whole family is thrilled with it.",
        "Everyone was friendly and quick.",
        "It still runs perfectly after two years.",
    ),
    ("heldout", "positive"): (
        "I can't stop smiling when I use it.",
        "This {thing} is a dream.",
        "Absolutely worth the money.",
        "I'd recommend the {thing} to all my friends.",
        "We had a wonderful time and will come back.",
        "The {part} blew me away.",
    ),
    ("train", "negative"): (
        "I hate it.",
        "It broke after two days.",
        "Worst {thing} I have ever had.",
        "I want to send it back.",
        "A complete waste of money.",
        "Never again.",
        "Nobody answered my calls.",
        "One star is still too much.",
        "The {part} made me angry.",
        "It stopped working within a week.",
        "The waiter was rude and the food was cold.",
        "I regret buying this {thing}.",
        "It was dirty and smelled bad.",
        "Do not buy this {thing}.",
        "We waited an hour and then left.",
    ),
    ("heldout", "negative"): (
        "It fell apart the first time I used it.",
        "Save your money and stay away from this {thing}.",
        "I am very unhappy with the {part}.",
        "What a letdown.",
        "The {thing} arrived scratched and did not even start.",
        "We left early because it was so dull.",
    ),
    ("train", "neutral"): (
        "It does what it says.",
        "It came in a brown box.",
        "I have no strong opinion about the {thing}.",
        "Some things are good, others are not.",
        "Not great, not terrible.",
        "It is a {thing} like any other.",
        "You get what you pay for.",
        "I use it now and then.",
        "The {part} could be better, but it could be worse too.",
        "I neither love nor hate this {thing}.",
        "It is a {thing} with the usual features.",
        "There is not much to say about the {part}.",
        "It has the size that is given on the page.",
        "Three stars, somewhere in the middle.",
        "The {part} is good, but the rest is poor.",
    ),
    ("heldout", "neutral"): (
        "It's a normal {thing}, no more and no less.",
        "The {thing} has both strong and weak sides.",
        "It comes with a cable and a manual.",
        "I don't feel strongly about it either way.",
        "The {part} is about what you would expect.",
        "I have seen better and I have seen worse.",
    ),
}
ASIDES = {
    "train": (
        "I bought it in March.",
        "It was a gift for my sister.",
        "We went there on a Sunday.",
        "I ordered it online.",
        "My old one was from another brand.",
        "It is the black version.",
    ),
    "heldout": (
        "My brother told me about it.",
        "It's my second one.",
        "We were there with four people.",
    ),
}


def draw(split: str, rng: random.Random) -> tuple[str, str]:
    """A review of one to three sentences and its label."""
    label = rng.choice(("positive", "negative", "neutral"))
    sentences = [_judgement(split, label, rng)]
    if rng.random() < 0.55:
        sentences.append(_judgement(split, label, rng))
    if rng.random() < 0.25:
        sentences.insert(rng.randrange(len(sentences) + 1), rng.choice(ASIDES[split]))
    thing = rng.choice(THINGS[split].split(","))
    parts = PARTS[split].split(",")
    written = [part.format(thing=thing, part=rng.choice(parts)) for part in sentences]
    return " ".join(part[0].upper() + part[1:] for part in written), label


def _judgement(split: str, label: str, rng: random.Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(WHOLE[split, label])
    adjective = rng.choice(ADJECTIVES[split, label].split(","))
    shape = rng.choice(SHAPES[split])
    return shape.replace("{adj}", adjective).replace("{Adj}", adjective.capitalize())
