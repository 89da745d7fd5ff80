"""How the parts of a text-to-SQL question are worded; `{}` is where a column or a value goes."""

# fmt: off
COMPARISONS = {
    '>': ('is above {}', 'is greater than {}', 'is over {}'),
    '<': ('is below {}', 'is less than {}', 'is under {}'),
    '>=': ('is at least {}', 'is {} or more'),
    '<=': ('is at most {}', 'is {} or less'),
    'BETWEEN': ('is between {} and {}', 'is from {} to {}'),
    '=': ('is {}', 'equals {}'),
    '!=': ('is not {}', 'is other than {}'),
}
AGGREGATES = {
    'AVG': ('the average {}', 'the mean {}'),
    'SUM': ('the total {}', 'the sum of {}'),
    'MIN': ('the minimum {}', 'the smallest {}'),
    'MAX': ('the maximum {}', 'the largest {}'),
}
COUNT = ('the number of {}', 'the count of {}')

SELECTIONS = {
    'list': ('List the {what} of {source}', 'Show the {what} for all {source}',
             'What are the {what} of {source}', 'Find the {what} of the {source}'),
    'total': ('Give {what} over {source}', 'Compute {what} for {source}',
              'What are {what} of {source}'),
    'group': ('For each {group}, show {what} over {source}', 'Show {what} per {group} for {source}',
              'Group {source} by {group} and give {what}'),
}
SOURCES = {
    'one': ('{0}',),
    'join': ('{0} and their {1}', '{1} with their {0}', '{0} joined with {1}'),
    'link': ('{0} and {2} linked by {1}', '{0} with their {2} through {1}'),
}

WHERE = (' whose {}', ' where {}', ' such that {}')
JOIN_WHERE = (' where {}', ' such that {}', ' in which {}')
INNER_WHERE = (' whose {}', ' for which {}')
CONNECTORS = ((' and ', 'AND'), (' and also ', 'AND'), (' or ', 'OR'))
MEMBERS = (('that have no {}', 'NOT IN'), ('without any {}', 'NOT IN'),
           ('that have {}', 'IN'), ('with some {}', 'IN'))
HAVING = (', keeping groups where {}', ', only if {}')
ORDERS = (
    (', sorted by {} descending', 'DESC'), (', arranged by {}, highest first', 'DESC'),
    (', ordered by {} from high to low', 'DESC'), (', sorted by {} ascending', 'ASC'),
    (', arranged by {}, lowest first', 'ASC'), (', ordered by {} from low to high', 'ASC'),
)
LIMITS = (', only the first {}', ', top {} only', ', limited to {} rows')
