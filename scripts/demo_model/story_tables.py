"""Words and sentence templates of the stories. `{slots}` are filled from `WORDS`; `{he}`, `{his}` ... follow from the hero's name."""

from __future__ import annotations

GIRLS = ("Mia", "Lily", "Anna", "Ella", "Nora", "Ruby", "Tess", "Zoe")
BOYS = ("Tom", "Ben", "Max", "Leo", "Sam", "Finn", "Jack", "Oscar")
PRONOUNS = {
    "girl": {"he": "she", "He": "She", "his": "her", "His": "Her", "him": "her"},
    "boy": {"he": "he", "He": "He", "his": "his", "His": "His", "him": "him"},
}
WORDS = {
    "kind": ("rabbit", "fox", "bear", "mouse", "squirrel", "kitten", "puppy", "badger", "lamb", "beaver"),
    "friend": ("hedgehog", "frog", "duck", "turtle", "robin", "snail", "donkey", "goose", "mole", "pony"),
    "nature": ("little", "small", "kind", "brave", "curious", "shy", "clever", "gentle", "cheerful", "funny"),
    "home": ("in the forest", "near the river", "by the sea", "on a green hill", "behind the old mill", "under a big tree",
             "at the edge of the village", "in a quiet valley"),
    "place": ("garden", "meadow", "forest", "barn", "field", "orchard", "valley", "market"),
    "thing": ("ball", "kite", "hat", "drum", "bell", "scarf", "basket", "key", "book", "lantern"),
    "color": ("red", "blue", "green", "yellow", "white", "purple", "golden", "silver"),
    "food": ("bread", "cake", "soup", "honey", "jam", "cheese", "pudding", "pie"),
    "fruit": ("apple", "pear", "cherry", "plum", "peach", "lemon"),
    "plant": ("rose", "sunflower", "carrot", "pumpkin", "tulip", "bean", "daisy", "turnip"),
    "weather": ("rain", "snow", "wind", "fog"),
    "hiding": ("behind a stone", "under a bush", "in the tall grass", "next to a log", "in a hollow tree", "near the fence"),
    "feeling": ("happy", "glad", "proud", "thankful", "joyful"),
    "game": ("hide and seek", "catch", "hopscotch", "tag"),
    "time": ("morning", "afternoon", "day", "evening"),
}

OPENINGS = (
    "Once upon a time, there was a {nature} {kind} named {hero}.",
    "Once upon a time, a {nature} {kind} named {hero} lived {home}.",
    "Once upon a time, {home}, there lived a {nature} {kind} named {hero}.",
    "Once upon a time, there was a {kind} named {hero} who was very {nature}.",
)
HABITS = (
    "{hero} loved to play {game} in the {place}.",
    "Every {time}, {hero} walked through the {place}.",
    "{hero} liked to eat {food} more than anything else.",
    "{hero} had a {color} {thing} and took it everywhere.",
    "{His} best friend was a {friend}.",
)
ENDINGS = (
    "{hero} was very {feeling}.",
    "From that day on, {hero} and the {friend} were best friends.",
    "{hero} went home and slept well that night.",
    "They all laughed and ate {food} together.",
    "It was the best {time} of {his} life.",
    "And they played {game} until the sun went down.",
    "{hero} never forgot that {time}.",
)

# A plot is a list of steps; each step is told by one of its sentences.
LOST = (
    ("One {time}, {hero} could not find {his} {color} {thing}.", "One {time}, {hero} lost {his} {color} {thing} in the {place}."),
    ("{He} looked everywhere, but the {thing} was gone.", "{hero} was sad and began to cry.",
     '"Where is my {thing}?" asked {hero}.'),
    ("A {friend} heard {him} and wanted to help.", '"I will help you," said the {friend}.', "Then a {friend} came along the path."),
    ("Together they searched the whole {place}.", "They looked {hiding}, but there was nothing.",
     "The {friend} looked {hiding} while {hero} searched the {place}."),
    ("At last they found the {thing} {hiding}.", '"Here is your {thing}!" said the {friend}.',
     "There it was, the {color} {thing}, {hiding}."),
    ('"Thank you for your help," said {hero}.', "{hero} hugged the {friend} and said thank you."),
)
STORM = (
    ("One {time}, there was a lot of {weather} in the {place}.", "One {time}, the {weather} would not stop."),
    ("{hero} was cold and wanted to go home.", "{hero} was afraid of the {weather}.", "{hero} could not see the way home."),
    ("A {friend} sat {hiding} and was cold too.", "Then {hero} saw a {friend} who shivered {hiding}."),
    ('"Come with me to my warm house," said {hero}.', '"We can wait here together," said the {friend}.'),
    ("They shared some {food} and told each other stories.", "They made a fire and ate warm {food}.",
     "{hero} gave the {friend} a {color} scarf."),
    ("Soon the {weather} was over and the sun came out.", "In the end the {weather} went away."),
)
BAKING = (
    ("One {time}, {hero} wanted to make {food} for a {friend}.", "One {time}, {hero} and a {friend} wanted to bake a {fruit} cake."),
    ("But there was not one {fruit} in the house.", "First {hero} went to the {place} to find a {fruit}.",
     "{He} looked for a basket and a big spoon."),
    ("The {friend} had picked a {fruit} and gave it to {him}.", "The {friend} showed {him} a tree where a {fruit} was ripe."),
    ("{hero} mixed everything in a {color} bowl.", "They stirred and stirred until their arms were tired."),
    ("The whole house smelled of {food}.", "The smell of {food} went all the way to the {place}."),
    ('"This is the best {food} in the world," said the {friend}.', "{hero} cut it into pieces and gave the first one to the {friend}."),
)
GARDEN = (
    ("One {time}, {hero} and a {friend} found a small seed {hiding}.", "One {time}, a {friend} gave {hero} a small seed."),
    ("{He} put the seed into the ground and gave it water.", "{hero} made a hole in the ground and put the seed in."),
    ("Every {time} {he} went to look, but nothing grew.", "For many days nothing happened."),
    ('"You have to wait," said the {friend}.', '"Will it ever grow?" asked {hero}.', "{hero} sang a song for the seed."),
    ("Then, after the {weather}, a {plant} came out of the ground.", "One {time} there was a beautiful {color} {plant}."),
    ("{hero} showed the {plant} to the {friend}.", "Everyone came to the {place} to see the {plant}."),
)
GIFT = (
    ("It was the birthday of a {friend} from the {place}.", "One {time}, a {friend} had a birthday."),
    ("{hero} wanted to give the {friend} a {color} {thing}.", "{hero} thought about a present for a long time."),
    ("{He} went to the {place} to look for one.", "But {hero} had no money at all."),
    ("So {hero} made a {thing} out of wood and painted it {color}.", "At the {place} {he} found a {thing} that nobody wanted."),
    ("{hero} put the {thing} in a {color} box.", "{hero} carried it carefully to the party."),
    ('"I love this {thing}!" said the {friend}.', "The {friend} opened the box and smiled.",
     '"It is the nicest present of all," said the {friend}.'),
)
RIVER = (
    ("One {time}, {hero} and a {friend} came to a wide river.", "One {time}, {hero} and a {friend} wanted to cross the river."),
    ("On the other side there was a {fruit} tree.", "On the other side stood a {color} house."),
    ("The water was deep and {hero} could not swim.", "There was no bridge and no boat."),
    ('"Do not be afraid," said the {friend}.', '"Can you help me?" asked {hero}.'),
    ("They put a long log over the water.", "{hero} sat down on the back of the {friend}.", "They jumped from stone to stone."),
    ("On the other side they ate a sweet {fruit}.", "Step by step {hero} came to the other side."),
)
PLOTS = ((LOST, (3, 5)), (STORM, (1, 5)), (BAKING, (1, 4)), (GARDEN, (2, 3)), (GIFT, (2, 4)), (RIVER, (1, 3)))
"""Each with the steps that it can do without."""
