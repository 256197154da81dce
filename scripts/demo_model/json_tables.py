"""What the demo model's JSON objects are about, and words for their strings."""

from __future__ import annotations

NAMES = ("Mia", "Tom", "Anna", "Ben", "Ella", "Leo", "Nora", "Max", "Zoe", "Sam", "Ruby", "Finn")
WORDS = ("red", "blue", "green", "small", "large", "new", "old", "open", "closed", "soft", "round", "flat", "north", "south",
         "east", "west", "one", "two", "apple", "pear", "bread", "milk", "salt", "tea", "paper", "pen", "book", "lamp",
         "chair", "table", "door", "key", "box", "cup", "ball", "bell", "hat", "coat", "shoe", "river", "hill", "lake", "tree",
         "rose", "sun", "rain", "snow", "cat", "dog", "fox", "hen", "owl", "cow", "home", "work", "school", "music", "art",
         "sport", "fast", "slow", "ok", "yes", "no")
CITIES = ("Paris", "Rome", "Berlin", "Oslo", "Madrid", "Vienna", "Tokyo", "Lima", "Cairo", "Ottawa")
ABOUT = {
    "a person": ("name", "age", "city", "email", "married", "hobbies", "height"),
    "an animal": ("name", "kind", "age", "legs", "color", "wild", "weight"),
    "a book": ("title", "author", "year", "pages", "price", "tags"),
    "a car": ("brand", "color", "year", "price", "doors", "electric"),
    "a city": ("name", "country", "population", "capital", "river"),
    "an order": ("id", "items", "total", "paid", "customer", "note"),
    "a product": ("id", "name", "price", "stock", "tags", "size"),
    "a recipe": ("name", "minutes", "ingredients", "servings", "easy"),
    "a user": ("id", "name", "email", "active", "roles", "score"),
    "an event": ("title", "date", "place", "guests", "public"),
    "a house": ("rooms", "color", "garden", "address", "price"),
    "a list": ("title", "items", "count", "done"),
    "a weather report": ("city", "temperature", "wind", "rain", "sky"),
    "a game": ("name", "players", "score", "winner", "level"),
    "a file": ("name", "size", "type", "hidden", "lines"),
    "a task": ("title", "done", "priority", "tags", "owner"),
}
"""Subjects and the keys of their objects."""

KEY_KINDS = {
    "name": ("name", "author", "customer", "owner", "winner"),
    "word": ("kind", "color", "brand", "river", "sky", "type", "size", "note", "title"),
    "city": ("city", "country", "place", "capital"),
    "email": ("email",),
    "date": ("date",),
    "year": ("year",),
    "few": ("age", "legs", "doors", "servings", "guests", "rooms", "players", "level", "priority", "minutes"),
    "integer": ("pages", "population", "id", "stock", "count", "lines", "score"),
    "number": ("height", "weight", "price", "total", "temperature", "wind"),
    "boolean": ("married", "wild", "electric", "paid", "easy", "active", "public", "garden", "done", "rain", "hidden"),
    "words": ("hobbies", "tags", "items", "ingredients", "roles"),
    "address": ("address",),
}
"""The kind of value that each key has."""

REQUESTS = (
    "Give me a JSON object about {x}.",
    "Write a JSON object for {x}.",
    "Write JSON about {x}.",
    "Describe {x} in JSON.",
    "Please describe {x} as a JSON object.",
    "I need a JSON object for {x}.",
    "Make up {x} and answer in JSON.",
    "JSON for {x}, please.",
)
KEY_REQUESTS = (
    "Give me a JSON object with the keys {keys}.",
    "Write a JSON object with the keys {keys}.",
    "Write JSON with {keys}.",
    "I need a JSON object that has {keys}.",
    "Fill in as JSON: {keys}.",
)
SCHEMA_REQUESTS = (
    "Write JSON for this schema: {schema}",
    "Give me a JSON object for the schema {schema}",
    "Answer in JSON that follows this schema: {schema}",
)
ARRAY_REQUESTS = {
    "integer": ("Give me a JSON array of numbers.", "Write some numbers as JSON.", "I need a JSON list of numbers."),
    "word": ("Give me a JSON array of words.", "Write some words as JSON.", "I need a JSON list of words."),
    "boolean": ("Give me a JSON array of booleans.", "Write true and false values as a JSON array."),
    "any": ("Give me a JSON array.", "Write any JSON array.", "I need a short JSON list."),
}
