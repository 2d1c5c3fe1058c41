"""The names of reasoning-gym's data sets. Apart from the task, because `import lmgym` reads them and must be quick."""

READ_VERSION = "0.1.25"
"""The version of reasoning-gym whose data sets were read."""

_EVAL = "passes the completion to Python's eval, which runs it"
_SYMPY = "passes the completion to SymPy's parse_expr, which evaluates it as Python"

RUN_CODE = {
    "binary_matrix": _EVAL,
    "codeio": "runs Python programs that a language model wrote, to make its questions",
    "countdown": _SYMPY,
    "intermediate_integration": _SYMPY,
    "n_queens": _EVAL,
    "polynomial_multiplication": _SYMPY,
    "puzzle24": _SYMPY,
    "simple_integration": _SYMPY,
    "spiral_matrix": _EVAL,
    "string_insertion": _EVAL,
}
"""Data sets that run code, and how."""

READ_NAMES = (
    "ab", "acre", "advanced_geometry", "aiw", "arc_1d", "arc_agi", "base_conversion", "basic_arithmetic", "bf",
    "binary_alternation", "bitwise_arithmetic", "boxnet", "caesar_cipher", "calendar_arithmetic", "chain_sum",
    "circuit_logic", "coin_flip", "color_cube_rotation", "complex_arithmetic", "count_bits", "count_primes",
    "course_schedule", "cryptarithm", "decimal_arithmetic", "decimal_chain_sum", "dice", "emoji_mystery",
    "family_relationships", "figlet_font", "fraction_simplification", "futoshiki", "game_of_life",
    "game_of_life_halting", "gcd", "graph_color", "group_anagrams", "gsm_symbolic", "isomorphic_strings", "jugs",
    "kakurasu", "knight_swap", "knights_knaves", "largest_island", "lcm", "leg_counting", "letter_counting",
    "letter_jumble", "list_functions", "mahjong_puzzle", "manipulate_matrix", "maze", "mini_sudoku", "modulo_grid",
    "needle_haystack", "number_filtering", "number_format", "number_sequence", "number_sorting",
    "palindrome_generation", "palindrome_partitioning", "path_star", "polynomial_equations", "pool_matrix",
    "power_function", "prime_factorization", "products", "propositional_logic", "quantum_lock", "ransom_note",
    "rearc", "rectangle_count", "rotate_matrix", "rotten_oranges", "rubiks_cube", "rush_hour", "self_reference",
    "sentence_reordering", "shortest_path", "simple_equations", "simple_geometry", "sokoban", "spell_backward",
    "string_manipulation", "string_splitting", "string_synthesis", "sudoku", "survo", "syllogism", "time_intervals",
    "tower_of_hanoi", "tsumego", "word_ladder", "word_sequence_reversal", "word_sorting", "zebra_puzzles",
)  # fmt: skip
"""Data sets whose scoring and whose questions were read, and pass nothing that the model wrote to an interpreter."""
