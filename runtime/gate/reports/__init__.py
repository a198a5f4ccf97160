"""A gate's report as JUnit XML, Markdown and one self-contained HTML page. Text from outside is escaped in each."""
