"""A plain parser of one transcript, to test the state machine against."""

import itertools


class Broken(Exception):
    pass


class Reader:
    """Reads one transcript, token by token, and labels what it has read."""

    def __init__(self, grammar, names, tokens):
        self.grammar, self.names, self.tokens = grammar, names, list(tokens)
        self.labels, self.phase = [], "slate"
        self.lists = {"slate": [], "rank": []}

    def fail(self, rule):
        raise Broken(rule if rule == "trailing_text" else f"{self.phase}_{rule}")

    def peek(self):
        if len(self.labels) == len(self.tokens):
            self.fail("truncated")
        return self.tokens[len(self.labels)]

    def take(self):
        token = self.peek()
        self.labels.append({"slate": 1, "rank": 2}[self.phase])
        return token

    def starts_name(self, token):
        return any(name[0] == token for name in self.names)

    def item(self):
        """The candidate named next, and whether only the token after it could tell."""
        read = ()
        while True:
            longer = [n for n in self.names if n[: len(read)] == read and len(n) > len(read)]
            if read in self.names and not longer:
                return self.names.index(read), False
            if self.peek() in [n[len(read)] for n in longer]:
                read += (self.take(),)
            elif read in self.names:
                return self.names.index(read), True
            else:
                self.foreign(self.take(), may_be_empty=not read)

    def foreign(self, token, may_be_empty):
        if may_be_empty and not self.lists[self.phase] and token == self.close()[0]:
            self.fail("empty")
        self.fail("missing_tag" if token == self.grammar.eos else "out_of_pool")

    def close(self):
        return self.grammar.slate_close if self.phase == "slate" else self.grammar.rank_close

    def add(self, item, late):
        items, most = self.lists[self.phase], self.grammar.slate_max
        broken = None
        if item in items:
            broken = "duplicate"
        elif self.phase == "rank" and item not in self.lists["slate"]:
            broken = "not_in_slate"
        elif len(items) >= (most if self.phase == "slate" else self.grammar.rank_max):
            broken = "too_long"
        if broken:
            if late:
                self.take()
            self.fail(broken)
        items.append(item)

    def closes(self):
        """Read what stands after an item: whether it closed the list."""
        if not self.grammar.separator:
            if self.starts_name(self.peek()):
                return False
            if self.peek() != self.close()[0]:
                self.foreign(self.take(), may_be_empty=False)
        literals = [x for x in (self.grammar.separator, self.close()) if x]
        for pos in itertools.count():
            token = self.take()
            literals = [x for x in literals if x[pos] == token]
            if not literals:
                self.fail("missing_tag")
            for literal in literals:
                if len(literal) == pos + 1:
                    return literal == self.close()

    def read_list(self, at_least):
        while True:
            self.add(*self.item())
            if self.closes():
                if len(self.lists[self.phase]) < at_least:
                    self.fail("too_short")
                return

    def read(self):
        try:
            self.read_list(min(self.grammar.slate_min, len(self.names)))
            self.phase = "rank"
            self.read_list(min(self.grammar.rank_min, len(self.lists["slate"])))
            if self.take() != self.grammar.eos:
                self.fail("trailing_text")
            return "ok"
        except Broken as broken:
            return str(broken)


def plain_parse(grammar, names, tokens):
    reader = Reader(grammar, names, tokens)
    outcome = reader.read()
    labels = reader.labels + [0] * (len(tokens) - len(reader.labels))
    return reader.lists["slate"], reader.lists["rank"], outcome, labels
