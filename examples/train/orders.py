"""Order mails and the JSON that says what was ordered."""

import json
import random

FIRST_NAMES = {
    "train": "Emma James Olivia Liam Sofia Noah Mia Lucas Clara Henry Amira Mateo Ingrid Yusuf "
    "Grace Pavel Nadia Oscar Leila Victor Hannah Kenji Rosa Samuel Fatima George Elena Tom Priya "
    "Martin Zoe Bruno Aisha Erik Teresa Hugo Naomi Igor Lena Marcus Yara Felix Dora Rashid Vera "
    "Simon Bianca Otto Meera Colin",
    "heldout": "Alice Benjamin Chloe Daniel Freya Ibrahim Julia Karl Maria Peter Ruth Stefan "
    "Helen Andre Rebecca Tobias",
}
LAST_NAMES = {
    "train": "Smith Garcia Novak Andersen Patel Rossi Dubois Kim Schneider Silva Johnson Kowalski "
    "Haddad Larsen Moreau Tanaka Bauer Costa Murphy Ivanov Nguyen Fischer Lopez Clarke Janssen "
    "Brown Petrov Romano Walker Singh",
    "heldout": "Adams Becker Chen Evans Fernandez Hughes Lindberg Mueller Okoye Turner Vargas "
    "Young Reed Ferrari Nakamura Sharma",
}
CITIES = {
    "train": "Paris,Madrid,Chicago,Oslo,Rome,Vienna,Dublin,Boston,Lisbon,Warsaw,Hamburg,Seattle,"
    "Prague,Milan,Geneva,Denver,Athens,Leeds,Montreal,Tokyo,New York,San Diego,Buenos Aires,"
    "Cape Town,Nairobi,Mumbai,Porto,Antwerp,Glasgow,Helsinki",
    "heldout": "London,Munich,Barcelona,Austin,Stockholm,Zurich,Brussels,Sydney,Krakow,"
    "Los Angeles,Bristol,Cairo,Marseille,Liverpool,Portland,Valencia,Rotterdam,Melbourne,"
    "Santa Fe,Budapest,Osaka,Naples",
}
ITEMS = {
    "train": "desk lamp,office chair,notebook,water bottle,keyboard,candle,table,phone case,jacket,"
    "picture frame,backpack,blanket,kitchen knife set,tea pot,yoga mat,USB cable,plant pot,belt,"
    "wall clock,towel,paper bag,bar stool,frying pan,pillow,ladder,pen,bicycle helmet,"
    "printer cartridge,rain coat,tent,laptop stand,ring,shirt,board game,drill,vase",
    "heldout": "coffee grinder,bookshelf,running sock,desk organizer,hand mixer,umbrella,"
    "camping stove,wine glass holder,monitor arm,travel mug,ceramic bowl,door mat,headset,"
    "gardening glove,suitcase,bath robe,toaster,surfboard",
}
QUALITIES = {
    "train": "red,large,cheap,wooden,foldable,black,round,heavy,waterproof,silver,used,cotton,"
    "electric,blue,thin,Italian,vintage,striped,portable,plain,brass,child-size,grey,soft",
    "heldout": "green,small,leather,yellow,wireless,oval,stainless,premium",
}
INVENTED_STARTS = (
    "Brad Kel Mon Val Tor Gre Lu Har Zel Pin Ost Ro Ash Dun Fer Mar Ny Wal Car Hol Bel Sto Kra Zu "
    "Jo Vi Tam Que Il Eck Sha Pol Ga Wy Ber Ces"
)
INVENTED_ENDS = (
    "ford wick berg ina ona stad mere ova grad ville ton ham dale sen sky ler ano mont eira beck "
    "hurst lin escu nik port ella gate ley aro mund quist field zak tov aki ette"
)
NUMBERS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]
OPENINGS = {
    "train": "Hello,|Hi there,|Dear team,|Good morning,|Dear sales team,|Hey,|To whom it may "
    "concern,|Hello everyone,|Good afternoon,|",
    "heldout": "Hi,|Dear Sir or Madam,|Good evening,|Greetings,|Dear shop,|",
}
WANTS = {
    "train": (
        "I would like to order {n} {item}.",
        "please send me {n} {item}.",
        "we need {n} {item} as soon as possible.",
        "can you put me down for {n} {item}?",
        "I want to buy {n} {item} from your shop.",
        "this is an order for {n} {item}.",
        "could I get {n} {item}, please?",
        "my order: {n} {item}.",
        "I am writing to purchase {n} {item}.",
        "our office wants {n} {item}.",
        "I saw your catalogue and decided to take {n} {item}.",
        "we have chosen the {item}; please pack {n} of them.",
        "Item: {item}. Quantity: {n}.",
        "please reserve {n} {item} for me.",
        "I'll take {n} {item}.",
        "order: {item}, {n} pieces.",
        "we are interested in your {item} and would like {n}.",
    ),
    "heldout": (
        "please ship {n} {item}.",
        "I'd be happy to have {n} {item}.",
        "we wish to place an order for {n} {item}.",
        "would you be so kind as to prepare {n} {item}?",
        "I need {n} more {item} for our team.",
        "product: {item}, amount: {n}.",
        "kindly deliver {n} {item} to us.",
    ),
}
PLACES = {
    "train": (
        "Please deliver to {city}.",
        "The address is in {city}.",
        "Ship everything to our office in {city}.",
        "They should go to {city}.",
        "We are based in {city}.",
        "Delivery to {city}, please.",
        "City: {city}.",
        "I live in {city}.",
        "Please send it to {city} by Friday.",
        "It has to reach {city} before the weekend.",
        "Our shop is in {city}.",
        "Destination: {city}.",
        "You can bring the parcel to my flat in {city}.",
    ),
    "heldout": (
        "Our warehouse is located in {city}.",
        "Send the package to {city}, please.",
        "The parcel goes to {city}.",
        "I am at home in {city} all week.",
        "Deliver to: {city}.",
        "My home is in {city}.",
    ),
}
JOINED = {
    "train": (
        "please send {n} {item} to {city}.",
        "I would like {n} {item} delivered to {city}.",
        "we want {n} {item} for our branch in {city}.",
        "can I have {n} {item} sent to my house in {city}?",
        "the {city} office ordered {n} {item}.",
        "get {n} {item} to {city} by next week.",
    ),
    "heldout": (
        "could you ship {n} {item} to {city}?",
        "our team in {city} needs {n} {item}.",
        "I want {n} {item} shipped to {city}.",
    ),
}
FILLERS = {
    "train": (
        "The invoice can follow later.",
        "I found you through a friend.",
        "Please confirm by mail.",
        "Let me know the price.",
        "It is a gift.",
        "No hurry.",
        "We will pay by card.",
        "Last time everything was perfect.",
        "Call me if there is a problem.",
    ),
    "heldout": (
        "Please tell me when it is on the way.",
        "I hope they are in stock.",
        "Payment is by bank transfer.",
        "We look forward to it.",
    ),
}
ENDINGS = {
    "train": (
        "Thanks, {name}",
        "Best regards, {name}",
        "Kind regards,\n{name}",
        "Cheers, {name}",
        "Sincerely, {name}",
        "My name is {name}.",
        "Yours, {name}",
        "- {name}",
        "Thank you!\n{name}",
        "The order is for {name}.",
    ),
    "heldout": (
        "Many thanks, {name}",
        "Regards,\n{name}",
        "With best wishes, {name}",
        "Please put it under the name {name}.",
        "All the best, {name}",
    ),
}
INTRODUCTIONS = {
    "train": ("my name is {name}.", "I am {name}.", "{name} here.", "this is {name} from {city}."),
    "heldout": ("it's {name}.", "{name} speaking.", "I'm {name} and I live in {city}."),
}


def draw(split: str, rng: random.Random) -> tuple[str, str]:
    """An order mail and its JSON, whose values stand in the mail word for word."""
    first = rng.choice(FIRST_NAMES[split].split())
    name = f"{first} {_proper(LAST_NAMES[split].split(), split, rng)}"
    city = _proper(CITIES[split].split(","), split, rng)
    quantity = rng.choice((1, *range(2, 13), *range(2, 13), rng.randint(13, 60)))
    item = rng.choice(ITEMS[split].split(",")) + ("" if quantity == 1 else "s")
    if rng.random() < 0.5:
        item = f"{rng.choice(QUALITIES[split].split(','))} {item}"
    written = str(quantity)
    if quantity <= len(NUMBERS) and rng.random() < 0.5:
        written = NUMBERS[quantity - 1]
    mail = _mail(split, rng).format(n=written, item=item, city=city, name=name)
    fields = {"customer": name, "item": item, "quantity": quantity, "city": city}
    return mail, json.dumps(fields, separators=(",", ":"))


def _proper(known: list[str], split: str, rng: random.Random) -> str:
    """A proper name; two of three in the training are invented, so that it learns to copy."""
    if split == "train" and rng.random() < 2 / 3:
        return rng.choice(INVENTED_STARTS.split()) + rng.choice(INVENTED_ENDS.split())
    return rng.choice(known)


def _mail(split: str, rng: random.Random) -> str:
    opening = rng.choice(OPENINGS[split].split("|"))
    introduced = rng.random() < 0.25
    body = [rng.choice(INTRODUCTIONS[split])] if introduced else []
    if introduced and "{city}" in body[0]:
        body.append(rng.choice(WANTS[split]))
    elif rng.random() < 0.4:
        body.append(rng.choice(JOINED[split]))
    else:
        body += [rng.choice(WANTS[split]), rng.choice(PLACES[split])]
    if rng.random() < 0.3:
        body.append(rng.choice(FILLERS[split]))
    if not introduced:
        body.append(rng.choice(ENDINGS[split]))
    sentences = [part[0].upper() + part[1:] if part[0] != "{" else part for part in body]
    if opening and opening.endswith(","):
        sentences[0] = body[0]
    return " ".join([opening, *sentences]).strip()
