"""A result as one page that sorts, filters, zooms and needs no network: `mopsim explore`.

`views` makes of a command's JSON a list of tables, plots, bars and timelines, plain data; `page` puts them
and the scripts of this folder, which draw any such view, into one HTML file.
"""
