"""Other trainers' words: each module imports one host, when it is itself imported, and translates shapes, masks and
denominators."""
