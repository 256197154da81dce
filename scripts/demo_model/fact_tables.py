"""Tables of facts. A subject of a kind of fact is written as it stands within a sentence, with its article."""

from __future__ import annotations

COUNTRIES = tuple(tuple(line.split(", ")) for line in """\
France, Paris, Europe
Spain, Madrid, Europe
Italy, Rome, Europe
Germany, Berlin, Europe
Portugal, Lisbon, Europe
Greece, Athens, Europe
Austria, Vienna, Europe
Poland, Warsaw, Europe
Norway, Oslo, Europe
Sweden, Stockholm, Europe
Finland, Helsinki, Europe
Denmark, Copenhagen, Europe
Iceland, Reykjavik, Europe
Ireland, Dublin, Europe
Belgium, Brussels, Europe
Hungary, Budapest, Europe
Romania, Bucharest, Europe
Bulgaria, Sofia, Europe
Croatia, Zagreb, Europe
Ukraine, Kyiv, Europe
Egypt, Cairo, Africa
Kenya, Nairobi, Africa
Morocco, Rabat, Africa
Ghana, Accra, Africa
Nigeria, Abuja, Africa
Ethiopia, Addis Ababa, Africa
Japan, Tokyo, Asia
China, Beijing, Asia
India, New Delhi, Asia
Thailand, Bangkok, Asia
Vietnam, Hanoi, Asia
Nepal, Kathmandu, Asia
Iran, Tehran, Asia
Iraq, Baghdad, Asia
South Korea, Seoul, Asia
Canada, Ottawa, North America
Cuba, Havana, North America
Mexico, Mexico City, North America
Peru, Lima, South America
Chile, Santiago, South America
Brazil, Brasilia, South America
Argentina, Buenos Aires, South America
Australia, Canberra, Oceania
New Zealand, Wellington, Oceania""".splitlines())
"""(country, capital, continent)"""


def pairs(text: str) -> tuple[tuple[str, str], ...]:
    """``a=b, c=d`` as pairs."""
    return tuple((left.strip(), right.strip()) for left, right in (item.split("=") for item in text.split(",")))


def steps(text: str, round_trip: bool = False) -> tuple[tuple[str, str], ...]:
    """Each word with the one after it; after the last one the first, if it goes round."""
    words = text.split()
    return tuple(zip(words, words[1:] + words[:round_trip], strict=False))


def reverse(table: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """The pairs the other way round."""
    return tuple((right, left) for left, right in table)


CAPITALS = tuple((country, city) for country, city, _ in COUNTRIES)
CONTINENTS = tuple((country, continent) for country, _, continent in COUNTRIES)
SOUNDS = pairs("a cow=moo, a dog=woof, a cat=meow, a sheep=baa, a duck=quack, a pig=oink, a horse=neigh, a lion=roar, a "
               "mouse=squeak, an owl=hoot, a bee=buzz, a snake=hiss, a frog=croak, a wolf=howl, a donkey=hee-haw, a "
               "hen=cluck, a crow=caw, a turkey=gobble, a small bird=tweet")
YOUNG = pairs("a cow=calf, a dog=puppy, a cat=kitten, a sheep=lamb, a duck=duckling, a pig=piglet, a horse=foal, a "
              "lion=cub, a goat=kid, an owl=owlet, a goose=gosling, a swan=cygnet, a frog=tadpole, a deer=fawn, a "
              "hen=chick, a kangaroo=joey, a hare=leveret, an eagle=eaglet, an elephant=calf, a bear=cub")
LEGS = pairs("a cow=four, a dog=four, a cat=four, a duck=two, a spider=eight, an ant=six, a bee=six, a snake=no, a "
             "hen=two, a horse=four, a beetle=six, a fish=no, an elephant=four, a butterfly=six, a worm=no, an owl=two, a "
             "scorpion=eight, a mouse=four, a penguin=two, a fly=six")
HOMES = pairs("a bee=a hive, a bird=a nest, a dog=a kennel, a spider=a web, a horse=a stable, a rabbit=a burrow, a lion=a "
              "den, a pig=a sty, a beaver=a lodge, a hen=a coop, a fish=the water, a king=a palace")
COLOURS = pairs("grass=green, snow=white, coal=black, a banana=yellow, a lemon=yellow, the clear sky=blue, a ripe "
                "tomato=red, a carrot=orange, milk=white, chocolate=brown, a strawberry=red, an elephant=grey, a "
                "flamingo=pink, a crow=black, a swan=white, a fire engine=red, a cucumber=green, an eggplant=purple, a "
                "pumpkin=orange, a frog=green, salt=white, a raven=black")
_OPPOSITES = pairs("hot=cold, big=small, long=short, old=young, happy=sad, fast=slow, day=night, up=down, left=right, "
                   "open=closed, wet=dry, full=empty, hard=soft, high=low, light=dark, early=late, strong=weak, "
                   "rich=poor, clean=dirty, near=far, loud=quiet, thick=thin, good=bad, true=false, war=peace")
OPPOSITES = _OPPOSITES + reverse(_OPPOSITES)
NEXT_DAYS = steps("Monday Tuesday Wednesday Thursday Friday Saturday Sunday", round_trip=True)
NEXT_MONTHS = steps("January February March April May June July August September October November December", round_trip=True)
NEXT_LETTERS = steps("A B C D E F G H I J K L M N O P Q R S T U V W X Y Z")
NEXT_NUMBERS = tuple((str(n), str(n + 1)) for n in range(1, 30))
SUMS = tuple((f"{a} plus {b}", str(a + b)) for a in range(1, 11) for b in range(1, 11))
