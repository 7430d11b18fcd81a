"""What ranks print is shown once, and no line mixes the output of two."""

from __future__ import annotations

from distopt.launch import output
from distopt.launch.worker import rank_log


class Logs(dict):
    """What ranks have printed; reads as `Output` does."""

    def read(self, rank: int, offset: int) -> bytes:
        return self.get(rank, b"")[offset:]


def test_output_of_one_rank_is_shown_as_it_comes(capsys):
    logs = Logs({0: b"step 1\nst"})
    shown = output.Output([0], logs.read)
    shown.show()
    assert capsys.readouterr().out == "step 1\nst"
    logs[0] += b"ep 2\n\xff"
    shown.show()
    shown.show()
    assert capsys.readouterr().out == "ep 2\n\N{REPLACEMENT CHARACTER}"


def test_output_of_several_ranks_comes_in_whole_lines_with_their_numbers(capsys):
    logs = Logs({0: b"a\nb", 2: b"c\n"})
    shown = output.Output([0, 2], logs.read)
    shown.show()
    assert capsys.readouterr().out == "[0] a\n[2] c\n"
    logs[0] += b"b\n"
    shown.show()
    assert capsys.readouterr().out == "[0] bb\n"


def test_output_of_earlier_runs_is_left_out(capsys):
    logs = Logs({0: b"old\nnew\n"})
    output.Output([0], logs.read, [len(b"old\n")]).show()
    assert capsys.readouterr().out == "new\n"


def test_headers_of_attempts_are_shown_where_they_are_wanted(capsys):
    header = rank_log.header(0, 2, 0)
    logs = Logs({0: header + b"--- a heading\n"})
    output.Output([0], logs.read).show()
    assert capsys.readouterr().out == "--- a heading\n"
    output.Output([0], logs.read, headers=True).show()
    assert capsys.readouterr().out == header.decode() + "--- a heading\n"


def test_logs_are_read_from_files_and_from_a_job(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank-1.log").write_bytes("ü\nb".encode())
    read = output.of_files(tmp_path)
    assert (read(1, 0), read(1, 3), read(0, 0)) == ("ü\nb".encode(), b"b", b"")

    class Job:
        def logs(self, rank: int) -> str:
            return "ü\nb"

    assert output.of_job(Job())(1, 3) == b"b"
