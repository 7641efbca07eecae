"""The README, to which pages link where they are read in the repository, is the site's first page."""


def on_page_markdown(markdown, **kwargs):
    return markdown.replace("](../README.md", "](index.md")
