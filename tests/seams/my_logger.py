"""A logger: a CSV file."""

import csv

from distopt.train import Logger


class CsvLogger(Logger):
    """Writes step and ELBO to a CSV file in the run directory; the keyword arguments come from `args`.

    Args:
        file_name: Name of the file.
    """

    def __init__(self, file_name="metrics.csv"):
        self.file_name = file_name

    def start(self, run):
        path = run.run_dir / self.file_name
        rows = []
        if path.exists():
            with path.open(newline="") as file:
                rows = [row for row in csv.reader(file) if int(row[0]) <= run.first_step]  # those after it come again
        self.file = path.open("w", newline="")
        self.writer = csv.writer(self.file)
        self.writer.writerows(rows)

    def log(self, step, values):
        self.writer.writerow([step, values["elbo"]])
        self.file.flush()

    def close(self):
        self.file.close()
