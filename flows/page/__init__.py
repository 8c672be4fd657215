"""`opd report`: a run, or several, as one HTML page that needs no network.

build.py puts together what facts.py, curves.py, prompts.py and completions.py read from the store; page.html.j2 (Jinja, which
escapes every value), page.css and page.js show it. `vendor/` is Chart.js as published, with its licence."""
