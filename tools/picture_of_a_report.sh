#!/bin/sh
# The picture of README and docs: what `make train` leaves in runs/flights/report.html, down to the table of carriers.
# Needs Chromium. Usage: tools/picture_of_a_report.sh [REPORT]
set -e
report=$(realpath "${1:-runs/flights/report.html}")
chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1100,1330 \
  --screenshot=docs/_static/report.png "file://$report"
