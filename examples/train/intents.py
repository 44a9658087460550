"""Customers' messages and the intent behind each."""

import random

LABELS = (
    "refund_request",
    "track_order",
    "cancel_order",
    "change_address",
    "reset_password",
    "report_bug",
    "get_invoice",
    "talk_to_human",
)
MESSAGES = {
    ("train", "refund_request"): (
        "I would like a refund for the {item}.",
        "the {item} is broken, please give me my money back.",
        "how do I get a refund?",
        "I returned the {item} two weeks ago and still have no refund.",
        "you charged me twice, I want the second payment returned.",
        "I am not happy with the {item} and want to be paid back.",
        "please refund order {number}.",
        "the {item} does not fit, can I return it for my money?",
        "where is the money for the {item} I sent back?",
        "I demand a full refund.",
    ),
    ("heldout", "refund_request"): (
        "can I be reimbursed for the {item}?",
        "the {item} came damaged and I expect my payment back.",
        "I'd like to return the {item} and get the money back on my card.",
        "when will you refund me for order {number}?",
    ),
    ("train", "track_order"): (
        "where is my {item}?",
        "when will order {number} arrive?",
        "has my parcel been shipped yet?",
        "I am still waiting for the {item}.",
        "what is the status of order {number}?",
        "how long until the {item} gets here?",
        "the tracking page has not moved for days, where is my package?",
        "is my {item} on its way?",
        "my delivery is late.",
        "can you tell me where the driver is with my parcel?",
    ),
    ("heldout", "track_order"): (
        "I ordered a {item} last week, when does it come?",
        "could you check where order {number} is right now?",
        "my {item} should have been delivered yesterday but nothing came.",
        "is there any news about the shipment of my {item}?",
    ),
    ("train", "cancel_order"): (
        "please cancel order {number}.",
        "I want to cancel the {item}.",
        "I ordered the {item} by mistake, stop the order.",
        "can I still cancel?",
        "do not send the {item}, I changed my mind.",
        "I no longer need the {item} I ordered this morning.",
        "kindly annul my purchase {number}.",
        "I clicked twice, please remove one of the two orders.",
        "how can I cancel an order that has not shipped?",
        "stop order {number} before it goes out.",
    ),
    ("heldout", "cancel_order"): (
        "I'd like to call off my order for the {item}.",
        "I found the {item} cheaper elsewhere, so please cancel mine.",
        "don't ship order {number}, I don't want it any more.",
        "is it possible to cancel the {item} I bought an hour ago?",
    ),
    ("train", "change_address"): (
        "I moved, please change my address.",
        "please send order {number} to another address.",
        "my new address is in {city}.",
        "how do I update my delivery address?",
        "the street in my account is wrong, I live in {city} now.",
        "can you ship the {item} to my office instead?",
        "I typed the wrong house number for order {number}.",
        "please deliver the {item} to my neighbour in {city}.",
        "change the shipping address to {city}.",
        "I have a new postcode.",
    ),
    ("heldout", "change_address"): (
        "we are moving to {city} next week, where can I enter the new address?",
        "the {item} should go to a different address in {city}.",
        "I need to correct the street on order {number}.",
        "please update where you send my parcels, I live in {city} now.",
    ),
    ("train", "reset_password"): (
        "I forgot my password.",
        "how can I reset my password?",
        "I can't log in, it says wrong password.",
        "please send me a link for a new password.",
        "my account is locked after too many tries.",
        "I do not remember my login.",
        "the reset mail for my account never came.",
        "my password no longer works.",
        "I need to set a new password.",
        "help me get back into my account.",
    ),
    ("heldout", "reset_password"): (
        "I lost my password and can't sign in.",
        "can you help me choose a new password?",
        "it won't accept my password any more.",
        "I am locked out of my account.",
    ),
    ("train", "report_bug"): (
        "the app crashes when I open it.",
        "the website shows an error on the {page} page.",
        "the search button does nothing.",
        "the {page} page stays blank.",
        "your app freezes on my phone.",
        "I get error 500 when I click on {page}.",
        "the pictures do not load.",
        "there is a bug in the {page} screen.",
        "since the update the app is very slow and closes by itself.",
        "the page keeps loading forever.",
    ),
    ("heldout", "report_bug"): (
        "your site is not working, I only see an error message.",
        "the app closes every time I tap on {page}.",
        "something is broken on the {page} page, the button does not react.",
        "after the last update I only get a white screen.",
    ),
    ("train", "get_invoice"): (
        "please send me the invoice for order {number}.",
        "I need a receipt for the {item}.",
        "where can I download my bill?",
        "my accountant needs an invoice with the VAT number.",
        "I have not received an invoice yet.",
        "can I have the invoice as a PDF?",
        "there is no bill in the box with the {item}.",
        "I need the invoice made out to my company in {city}.",
        "please mail the receipt for {number} again.",
        "how do I get an invoice for my purchase?",
    ),
    ("heldout", "get_invoice"): (
        "could you email me a copy of the invoice for the {item}?",
        "I need a bill for my tax return.",
        "the receipt for order {number} is missing.",
        "where do I find the invoices of last year?",
    ),
    ("train", "talk_to_human"): (
        "I want to talk to a real person.",
        "please connect me with an agent.",
        "can somebody call me?",
        "is there a human I can speak to?",
        "I don't want to chat with a bot.",
        "give me the phone number of your support.",
        "let me speak to your manager.",
        "transfer me to a member of your staff.",
        "I need someone to talk to about my problem.",
        "this bot does not help, get me a person.",
    ),
    ("heldout", "talk_to_human"): (
        "may I speak with a human being?",
        "put me through to customer service, please.",
        "stop the robot answers, I want an employee.",
        "can a person from your team phone me?",
    ),
}
ITEMS = {
    "train": "lamp,jacket,blender,phone,carpet,desk,pair of boots,camera,mirror,tent,keyboard,"
    "drill,coat,table,watch",
    "heldout": "kettle,bicycle,sofa,headset,rucksack,printer,dress,bookshelf",
}
CITIES = {
    "train": "Paris,Oslo,Boston,Madrid,Vienna,Dublin,Rome,Chicago,Lisbon",
    "heldout": "London,Munich,Austin,Stockholm,Zurich",
}
PAGES = {
    "train": "checkout,payment,login,search,product,cart",
    "heldout": "wishlist,profile,settings",
}
OPENINGS = {
    "train": "Hello, |Hi there, |Good morning, |Dear team, |Excuse me, |Hey, |||||",
    "heldout": "Hi, |Good evening, |Sorry to bother you, ||||",
}
ENDINGS = {
    "train": " Thanks.| Thank you!| Please hurry.| I am waiting for an answer.| Best, Tom|"
    " Kind regards, Nadia|||||||",
    "heldout": " Many thanks!| It is urgent.| Regards, Karl||||",
}


def draw(split: str, rng: random.Random) -> tuple[str, str]:
    """A message and its label."""
    label = rng.choice(LABELS)
    message = rng.choice(MESSAGES[split, label]).format(
        item=rng.choice(ITEMS[split].split(",")),
        city=rng.choice(CITIES[split].split(",")),
        page=rng.choice(PAGES[split].split(",")),
        number=rng.choice(("#", "")) + str(rng.randint(10000, 99999)),
    )
    opening = rng.choice(OPENINGS[split].split("|"))
    if not opening:
        message = message[0].upper() + message[1:]
    return opening + message + rng.choice(ENDINGS[split].split("|")), label
