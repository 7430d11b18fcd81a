"""Which names a function's bytecode reads, and how."""

from distopt.infer.capture.watch import Watch, names_of

SETTINGS = {"scale": 1.0}


class Reader:
    def __init__(self):
        self.rows = [1, 2]
        self.pair = (1, 2)

    def read(self):
        return len(self.rows) + self.pair.count(1) + SETTINGS["scale"]

    def read_by_name(self, name):
        return getattr(self, name)


def test_globals_and_attributes_are_named_and_lengths_are_told_from_contents():
    names = names_of(Reader.read.__code__)
    assert names.roots == {"len", "SETTINGS"}
    assert names.attributes == {"rows", "pair", "count"}
    assert "rows" not in names.used and {"pair", "SETTINGS"} <= names.used
    assert not names.computed


def test_attributes_under_computed_names_are_noted():
    assert names_of(Reader.read_by_name.__code__).computed


def test_functions_are_noted_with_arguments_that_are_no_plain_values_and_with_what_they_close_over():
    factor = 2.0
    reader = Reader()

    def scaled(each, number):
        return each.read() * factor * number

    with Watch() as watch:
        scaled(reader, 3.0)
    calls = {call.code.co_name: (call, cells) for call, cells in watch.calls()}
    call, cells = calls["scaled"]
    assert call.args == {"each": reader}
    assert cells["factor"].cell_contents == 2.0
    assert calls["read"][0].args == {"self": reader}
