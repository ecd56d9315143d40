"""The pages people look at: one look, one self-contained HTML file each, readable without JavaScript.

`template` renders, `numbers` writes values for people, `svg` and `plots` draw; `bench` is the page of recorded bench runs. The
page of the Shark Tank is `glu4.tank.report`.
"""
