"""An evaluation as one HTML file that needs nothing else: no network, no server, no other file.

    page       what is on it, in which order; page.html, page.css and page.js are read from here
    tables     the numbers of table.txt
    training   what metrics.jsonl says of every stage
    losses     where queries were lost, as flows; what was within reach
    browser    every query, as data for page.js
    charts     figures as SVG: plain text, so that they are the same bytes everywhere, follow the colours of the
               page and are read by screen readers; a plotting library would add megabytes to every evaluation

What comes from users (texts, ids, names of runs) is escaped where it becomes HTML (markup.py); page.js makes text
nodes only, and the page's own policy allows no script but page.js.
"""
