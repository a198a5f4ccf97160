"""The words of requests and cards: terms, intent, other languages, typos."""
