"""Captions for comparing ours with pycocoevalcap and its Java tokenizer, by family. They depend on the seed alone.

`python tests/data/captions/strings.py` writes beside this file what pycocoevalcap makes of them: ptb.json (tokens) and
scores.json (scores). Needs Java.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

TABLE = Path(__file__).with_name("ptb.json")
SCORES = Path(__file__).with_name("scores.json")
TABLE_SEED, TABLE_COUNT = 2025, 260  # of the strings in the table
BARRIER = "qqq"  # a line between two captions, so that neither stands behind the other
LINE_ENDS = re.compile("[\n\x0b\x0c\r\u2028\u2029]")  # at these the Java tokenizer ends a line, so it gets spaces there

# Written by hand: what people write under pictures, at its worst.
CAPTIONS = """
A man's dog doesn't want to go into the water.
The woman can't find her keys, so she's looking under the couch
Two kids who'd rather be playing than posing for the camera.
They're going to the beach; we'll stay here.
I've never seen a cat that'll eat broccoli!
You cannot park here, says the sign.
The cat CANNOT get down from the tree
A boy is gonna jump off the dock.
She wanna eat that slice of pizza
Gotta catch 'em all
Gimme that donut!
Lemme see the giraffe
'Tis the season: a dog in a Santa hat
'Twas the night before Christmas and the cat was in the tree
Y'all come back now, reads the sign at the diner
A clock that reads 5 o'clock
a clock showing six o'clock.
A bowl of mac 'n' cheese next to a plate of fish 'n chips
Rock'n'roll band on stage; rock 'n' roll forever
A t-shirt that says "Rock n' Roll"
Goin' fishin' with grandpa
An ol' dog lyin' on the porch
The boys' and girls' restrooms
James's bike is parked next to the Joneses' car
Three men's suits and two women's dresses on a rack
The giraffes' necks are intertwined
A '57 Chevy and a '68 Mustang in a parking lot.
Cars from the '50s and the 1960's
A 1950s diner with a '50s-style jukebox
The class of '99
The summer of '69.
A ma'am and a sir at O'Hare airport
St. Patrick's Day parade on St. John St.
Mr. and Mrs. Smith cut the cake
Mr Smith and Dr Jones
Dr. Jones examines a patient.
A U.S. flag flies over the U.S.
A U.S flag and a U.K. flag
The U.S. Air Force jet is landing in the U.S.A.
a plane from u.s. airways
The train leaves at 7 p.m.
The train leaves at 7 p.m. sharp
It's 10:30 a.m. on the clock, not 10:30 p.m.
A clock tower reading 7:30
A digital clock reads 12:00AM.
A clock at 3:45pm.
A man (wearing a red hat) rides a horse.
A plate of food (sandwich, fries and a drink).
Woman in red [left] holding an umbrella {blue}
A sign reading "STOP" under a sign reading 'ALL WAY'
A sign that says "No Parking."
A sign that says "No Parking".
A "no turn on red" sign
A stop sign reads ''STOP HAMMER TIME''
“Smart quotes” and ‘single ones’ in the same caption
It’s a dog’s life, isn’t it?
Don’t walk sign
The kid says «hello» and „hallo“
A sign with the words ``Main St.'' on it.
A black-and-white photo of a man
A well-known double-decker bus
A two-year-old boy and a 10-year-old girl
Black and white photo of a man - and his dog
Black and white photo of a man -- and his dog
A dog—brown and white—runs
A dog – brown and white – runs
A cat/dog toy and/or a ball
His/her luggage w/o a tag
A half eaten sandwich w/ fries
A person in/on a boat
1,000 people watch a game
About 1,234,567 bees...
A $5 bill and a 50% off sign
A meal for $12.99!
Prices: $1.00, $2.50 & $3
A 3.5 inch floppy disk
A 1/2 eaten donut
1 1/2 sandwiches on a plate
A pizza cut in 1/4s, 3/4 gone
½ of a pizza and ¼ of a cake
2nd base player slides into 3rd.
The 1st, 2nd and 3rd place finishers
Number 23 throws the ball to #45
Player # 10 kicks a ball
A 5'10" man and a 6' ladder
A 12" pizza
12" x 14" canvas
A 747-400 is taking off
A Boeing 747 and an A320 and a B-52
A F-16 jet, an MiG-29
A 4x4 truck parked next to a 4 x 4 post
A 3D TV and a Wii U
An mp3 player
Photo taken 12/25/2014
Photo taken on 2014-12-25
Photo dated Jan. 5, 2012
A calendar open to Sept. 11
Date stamp 05.12.2009
Call 555-1234 for a good time
Call (555) 555-1234 or 1-800-555-1234
A truck with 555 555 1234 on the side
www.google.com is on the screen
A laptop showing http://www.example.com/index.html?x=1&y=2.
Email me at john.doe@example.com!
See photo at flickr.com/photos/john_doe
A file named IMG_1234.JPG
The file DSC0001.jpg, and 001.jpg
#selfie with my dog #love
@john and @jane_doe at the beach
AT&T store and a B&B
An at&t store
Salt & pepper shakers
R&B singer, Q&A session, M&Ms candy
salt&pepper
Fish &amp; chips
Men &lt;3 dogs
A dog &quot;smiling&quot; at the camera
A cat&nbsp;on a mat
The dog&#39;s bowl
The dog&apos;s bowl
A cute cat 😀
Happy family 👨‍👩‍👧‍👦 at the park
The flag 🇺🇸 of the U.S.
I ❤️ NY shirt
A heart ♥ and a star ★
Starbucks® coffee, Coca-Cola™ bottle © 2012
A café with crème brûlée
A jalapeño piñata
Müller's Fußball
Zażółć gęślą jaźń
Ένας σκύλος τρέχει
ΣΊΣΥΦΟΣ
Собака бежит по траве.
犬が走っている
一只狗在草地上跑。
개가 달리고 있다
كلب يركض في الحديقة
कुत्ता दौड़ रहा है
สุนัขวิ่งเล่น
Temperature is 72°F outside
a temperature of 25 °C
50 m² room, 3×4 grid, ±5
Wait... what is that?
Wait…what is that
A dog.. a cat.... a bird.....
Really?! No way!! What???
Is this a cat? Yes!
a man , a woman , and a dog .
A man,a woman,and a dog
A man.A woman
The end.The beginning
Hello;world:again
A dog:)
A happy dog :) and a sad cat :(
;-) winking :D :P
=) ^_^ -_-
I <3 pizza
<person> riding a <horse>
a <b>bold</b> statement<br/>
a <unk> on a table
A man <UNK>
x < y > z
A * B ** C
~ 50 people + dogs = fun
50+ people
A C++ book and a C# book
A .NET book
a_b under_score __init__
C:\\path\\to\\file
a | b \\ c / d
-LRB- literal -RRB-
soft\u00adhyphen and zero\u200bwidth
non\u00a0breaking space
  leading and trailing spaces\x20\x20
two  spaces   three
a tab\there
control\x01characters\x02
A.
a
.
...
!
?!
-

\x20\x20\x20
aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
A man holding a letter A.
A kid drawing the letter B. The letter is red.
Vitamin C. A bottle of it
He got a D. he is sad
Plan B is better than plan A. B. is fine
George W. Bush and J.K. Rowling
J. R. R. Tolkien
Washington D.C. skyline
Washington, D.C.
L.A. Lakers vs. N.Y. Knicks
a game of red vs blue
Inc. magazine and Apple Inc.
Johnson & Johnson Co.
Harry Connick, Jr. plays
Martin Luther King Jr. Blvd.
5th Ave. and 42nd St.
Rte. 66 and I-95
Highway No. 5
No. 1 fan
There is no.
There is no. 5 dogs
fig. 5 shows art. 7
etc.
dogs, cats, etc.
dogs, cats, etc., and birds
e.g. a dog, i.e. a pet
Approx. 5 ft. tall, 6 in. wide
5 lbs. of apples; 10 oz. steak
Sgt. Pepper, Gen. Lee, Capt. Kirk and Prof. X
Mt. Everest and Ft. Worth
Jan. Feb. Mar. Apr. May. Jun. Jul. Aug. Sep. Oct. Nov. Dec.
Mon. Tues. Wed. Thurs. Fri. Sat. Sun.
Calif. and Tex. and Mass. and Ill.
He has a Ph.D. in art
A Ph.D
M.D. and B.A.
The a.k.a. guy
An S.U.V. parked
SUV's and RV's
TV's, DVD's and CD's
the p's and q's
A's and B's
dog's's
C'mon, let's go
Nat'l Geographic
Int'l airport
gov't building
Li'l kid
Cap'n Crunch
s'mores by the fire
ne'er-do-well
jack-o'-lantern
jack-o-lanterns
will-o'-the-wisp
hors d'oeuvres on a tray
l'eau d'artagnan L'Oreal
D'Angelo's pizza
Qu'il est beau
rock 'em sock 'em robots
d'ye see it
more'n one
could've should've would've
couldn't've
shouldnt dont cant wont
ain't it
she'd've gone
I'm he's they'd we're you've it'll
I'M HE'S THEY'D WE'RE YOU'VE IT'LL DON'T
who's who're what's that's there's here's
y'all'd've
'cause it is fun
till 'til dawn
O'Neil, O'Brien and O'Reilly
Hawai'i and Qur'an
Xi'an, China
Chick-fil-A, 7-Eleven, Wal-Mart
7-up can
half-eaten, half-empty
pre-1950s building
mid-air; mid-Jan.\x20
U.S.-based team
un-iced cake --yum
- a dash first
-5 degrees and +5 degrees
20/20 vision 24/7 store
9/11 memorial
f/2.8 lens, 50mm, ISO-100
100km/h 60mph
5-10 people, 5–10 people
2-for-1
The score is 3-2
10:30-11:30
1:1
16:9 TV
100%
100 %
%50
€5 and £5 and ¥500 and 50¢ and US$5
5€
$$$
$5.00/lb
No smoking/no food/no drinks/no pets
a b c d
A man with a "I ♥ NY" t-shirt
A sign that reads: "Beware of Dog!!!"
He said, "It's mine."
'Hello,' she said.
'hello' 'world'
the 'dog' ran
''double single''
""double double""
«guillemets» ‹single›
„low‟ ‚single‛
“‘nested’ quotes”
"'nested' quotes"
`backtick`
´acute´
prime 5′10″
don`t can´t won‘t
fullwidth，comma。period
\ufeffBOM at start
right-to-left \u200fmark
line\u2028separator
next\u0085line
form\x0cfeed
new\nline
carriage\r\nreturn
bell\x07
U+FFFD \ufffd here
combining e\u0301 accent
ﬁrst ﬂoor ligature
ⅳ roman numeral Ⅳ
①②③ circled
x² + y³ = z⁴
H₂O
1⁄2 cup
№ 5
§ 5
¿Qué? ¡Sí!
À la carte
naïve coöperate
İstanbul ISPARTA ıspanak
ǅ titlecase
www.big-dogs.com or www.big-dogs.co/dogs/index_12
dogs, cats, etc.-a lot
on 1/1-11 and 12-25/2014
¾ of a cup, ⅔ of a cup
an anti- and a pro-war sign, (anti-)war
Plan B. Ms. Smith has plan C. Mrs. Smith
m s⁻¹, CO₂ and Na⁺, 10⁻¹²
a face ('-') and another (^_^)
<img alt="a dog (brown)"> in the page
\\*bold\\* and \\*\\*bolder\\*\\*
""".strip("\n").split("\n")
CAPTIONS += ["", "new\nline", "carriage\r\nreturn", "ends with newline\n", "\n", "first.\nSecond", "\u2028", "x" * 3000]

NOUNS = (
    "dog man woman giraffe zebra pizza bus train umbrella skateboard kitchen bathroom street clock sign bear".split()
)
VERBS = "sits stands runs is lying jumps eats holds plays looks rides".split()
COLOURS = "red blue black white brown large small young old wooden".split()
PLACES = "on a bench|in the grass|next to a car|under a tree|on the beach|at a table|in front of a building".split("|")

CONTRACTED = (
    "don't can't won't isn't ain't he's she'll they've we're I'm I'd it's who's dog's dogs' cannot gonna "
    "gotta wanna lemme gimme 'tis 'twas y'all o'clock ma'am 'em 'til 'cause rock'n'roll 'n' n' ol' goin' "
    "d'ye l'eau O'Neil D'Angelo Hawai'i more'n c'mon nat'l cap'n li'l s'mores e'er ev'ry could've "
    "should've let's that'd 's 'll n't doesn't've shan't mustn't needn't y'know 'nother b'day x's 90's "
    "'90s '99 James's boss' th' 'cuz gov't int'l cont'd pick'em"
).split()
NUMBERS = (
    "1 23 456 7890 1,000 1,00 12,345,678 3.5 .5 0.25 1.2.3 7:30 12:00pm 16:9 1/2 3/4 11/12 1-1/2 5-10 "
    "10-year-old 2nd 3rd 21st 50s 1990s '90s '08 $5 $1,000.50 5$ US$5 €20 £3 ¥500 50¢ 50% %50 #1 5' 5'10\" "
    '12" 4x4 3D 747-400 A320 B-52 F-16 mp3 h2o 100km 60mph 5lbs. 72°F 5°C 12/25/2014 12-25-14 2014-12-25 '
    "555-1234 (555)555-1234 1-800-555-1234 -5 +5 5+5 ½ 1½ ¼ 1⁄2 m² x³ ±5 3×4 1e5 1a a1 5,a 5. 5, 5: 10/10 "
    "24/7 9/11 f/2.8 1:2:3 00.5 1..2 1-2-3 -0.5 5-5.5"
).split()
NUMBERS += "1 1/2|2 3/4|(555) 555-1234|555 555 1234|+1 555 555 1234|No. 5|no. 7|fig. 3|pp. 5|# 5|5 %".split("|")
ABBREVIATED = (
    "Mr. Mrs. Ms. Dr. St. Ave. Blvd. Jr. Sr. Inc. Co. Corp. Ltd. etc. vs. e.g. i.e. a.m. p.m. U.S. u.s. U.K. U.S.A. "
    "D.C. Ph.D. M.D. Mt. Ft. Sgt. Gen. Jan. Feb. Sept. Dec. Mon. Thurs. Calif. Tex. Mass. mass. ill. Ill. No. no. "
    "ft. lbs. in. oz. approx. dept. Prof. Rev. Sen. A. b. C. I. x.y. a.k.a. N.Y. J.K. Z. al. Bros. Assn. Rd. Sq."
).split()
WEB = (
    "www.google.com http://a.com https://www.example.org/a/b?c=d&e=f#g example.com/path/file.html a.com b.net/x "
    "flickr.com/photos/x_y me@example.com john.doe@mail.co.uk @name @john_doe #love #LOVE #1 #a1 IMG_1234.jpg "
    "DSC0001.JPG 001.jpg photo.png a.b.c file.txt readme.md ftp://x.y mailto:a@b.c example.com. (http://a.b/c) 1.mp3"
).split()
JOINED = (
    "AT&T at&t R&B B&B Q&A M&Ms salt&pepper and/or his/her w/ w/o c/o a/b/c a/b/c/d black-and-white "
    "t-shirt half-eaten mid-air -yum yum- a--b a—b a–b a_b __x__ C++ C# .NET a+b a=b a*b a~b x|y a\\\\b <3 "
    ":) :( ;-) :D :P ^_^ -_- =) << >> &amp; &lt; &gt; &quot; &nbsp; &#39; &eacute; &mdash; <b> </b> <br/> "
    '<unk> <a href="x"> < > -LRB- -rrb- ( ) [ ] { } ... .. .... … !! ?? !? * ** @ @@ & ^ % $ # ~ ` \\ / | '
    "_ + = © ® ™ ° • · → ★ ♥ ✓ ″ ′"
).split()
FOREIGN = (
    "café naïve jalapeño Müller Łódź ÀLACARTE ΣΊΣΥΦΟΣ собака 犬 一只狗 개가 كلب कुत्ता สุนัข ﬁrst Ⅳ ① e\u0301 İ ı ß ſ ǅ "
    "😀 👨\u200d👩\u200d👧 🇺🇸 ❤\ufe0f ☺ \U0001d518 \U00020000 \xad so\xadft a\u200bb \ufeff \u200e ١٢٣ १२ ５ ＡＢ "
    "， 。 「x」 ¿Qué? ¡Sí! «x» “x” ‘x’ „x“ ‚x‘ ‹x› ’s don’t it’s ‘90s ’90s “‘x’” x′ a\u2010b a\u2011b a‒b a―b a−b "
    "½ ⅓ ⅛ € £ ¥ ¢ ₹ ² ₂"
).split()
MARKS = [" ", " ", " ", " ", ", ", ". ", " . ", "; ", ": ", " - ", " -- ", "-", "/", "", '"', ' "', "'", " '", "(",
         ") ", "! ", "? ", "... ", "…", "\t", "\u00a0", "  ", "&", "’", "”", " “", "—", "_", "."]  # fmt: skip


def _plain(rng: random.Random) -> str:
    """What COCO is made of."""
    noun, other = rng.choice(NOUNS), rng.choice(NOUNS)
    text = rng.choice(
        [
            f"A {rng.choice(COLOURS)} {noun} {rng.choice(VERBS)} {rng.choice(PLACES)}",
            f"two {noun}s and a {other}, {rng.choice(PLACES)}",
            f"There is a {noun} that {rng.choice(VERBS)} {rng.choice(PLACES)} with a {rng.choice(COLOURS)} {other}",
            f"The {noun}'s {other} {rng.choice(VERBS)} {rng.choice(PLACES)}",
            f"a {rng.choice(COLOURS)}-{rng.choice(COLOURS)} {noun} {rng.choice(PLACES)}",
        ]
    )
    return rng.choice([text, text.upper(), text.lower(), text]) + rng.choice(["", ".", " .", ". ", "!", "\n", ".."])


def _with(pieces: Sequence[str]) -> Callable[[random.Random], str]:
    """A caption with one to three of the pieces in it, mostly between spaces."""

    def make(rng: random.Random) -> str:
        words = _plain(rng).split(" ")
        for _ in range(rng.randint(1, 3)):
            piece = rng.choice(pieces)
            piece = rng.choice([piece, piece, piece, piece.upper(), piece.capitalize(), piece.lower()])
            piece = (
                rng.choice(["", "", "", '"', "(", "'", "“"])
                + piece
                + rng.choice(["", "", "", ".", ",", '"', ")", "!", "'s"])
            )
            words.insert(rng.randint(0, len(words)), piece)
        return " ".join(words[-rng.randint(3, 12) :])

    return make


def _jumble(rng: random.Random) -> str:
    """Pieces of every kind with marks between them, often without a space."""
    return "".join(rng.choice(JUMBLED) + rng.choice(MARKS) for _ in range(rng.randint(2, 6)))


def _curly(make: Callable[[random.Random], str]) -> Callable[[random.Random], str]:
    return lambda rng: make(rng).replace("'", rng.choice("’’’‘`´′"))


def _ascii_noise(rng: random.Random) -> str:
    return "".join(rng.choice(ASCII_NOISE) for _ in range(rng.randint(1, 12)))


def _unicode_noise(rng: random.Random) -> str:
    """Words with characters from anywhere in the basic plane (and some above) in and beside them."""
    blocks = [(0x80, 0x250), (0x250, 0x3100), (0x3100, 0xD800), (0xE000, 0x10000), (0x1F300, 0x1FB00)]
    any_char = [chr(rng.randrange(*rng.choice(blocks))) for _ in range(6)]
    return "".join(rng.choice([*any_char, "a", "B", "1", " ", "-", "'", "."]) for _ in range(rng.randint(1, 12)))


# Without the capital sigma, whose lower case beside a hyphen or a digit is known to differ.
JUMBLED = [
    *CONTRACTED,
    *NUMBERS,
    *ABBREVIATED,
    *WEB,
    *JOINED,
    *(piece for piece in FOREIGN if "Σ" not in piece),
    *NOUNS,
]
ASCII_NOISE = "aabcdnstxABTLS0123459  ''\"\"..,,--//&&@#:;!?()[]{}<>*_+=~^%$|\\`\t"
FAMILIES: dict[str, Callable[[random.Random], str]] = {
    "plain": _plain,
    "contractions": _with(CONTRACTED),
    "typographic quotes": _curly(_with(CONTRACTED)),
    "numbers": _with(NUMBERS),
    "abbreviations": _with(ABBREVIATED),
    "web": _with(WEB),
    "joined and symbols": _with(JOINED),
    "foreign and emoji": _with(FOREIGN),
    "jumble": _jumble,
    "ascii noise": _ascii_noise,
    "unicode noise": _unicode_noise,
}


def make_strings(count: int, seed: int) -> dict[str, list[str]]:
    """`count` strings of each family, and the handmade ones under "handmade"."""
    strings = {"handmade": CAPTIONS}
    for family, make in FAMILIES.items():
        rng = random.Random(f"{seed} {family}")
        strings[family] = [make(rng) for _ in range(count)]
    return strings


def make_lines(count: int, seed: int) -> list[str]:
    """Captions whose end can be read in the light of the next one's beginning."""
    rng = random.Random(seed)
    heads = "A man|The dog|the|5 dogs|1/2 of|555 1234|<b> x|\"A|(The|a|  The x|- x|'s|...|b>|It is|A|The||An apple|3rd"
    tails = "no.|A.|b.|etc.|u.s.|'99|'n|1.jpg|o'|y'|555|etc.-|b. The|'|Co.|x.|5.|fig. |z.|:)|it's|...|cat|Z.|art."
    return [f"{rng.choice(heads.split('|'))} {rng.choice(NOUNS)} {rng.choice(tails.split('|'))}" for _ in range(count)]


def java_lines(captions: Sequence[str]) -> list[str]:
    """What pycocoevalcap's tokenizer makes of the captions, read as the lines of one file."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    lines = [{"caption": LINE_ENDS.sub(" ", caption)} for caption in captions]
    return PTBTokenizer().tokenize({0: lines})[0]


def java_tokens(captions: Sequence[str]) -> list[str]:
    """The same for each caption by itself."""
    return java_lines([line for caption in captions for line in (caption, BARRIER)])[::2]


def write_table() -> None:
    strings = make_strings(TABLE_COUNT, TABLE_SEED)
    lines = make_lines(300, TABLE_SEED)
    table = {
        "families": {name: list(zip(some, java_tokens(some), strict=True)) for name, some in strings.items()},
        "lines": list(zip(lines, java_lines(lines), strict=True)),
    }
    text = json.dumps(table, ensure_ascii=True, separators=(",", ":")).replace("],[", "],\n[")
    TABLE.write_text(text + "\n", encoding="utf-8")


def make_captions(images: int, seed: int) -> tuple[dict[int, list[str]], dict[int, str]]:
    """References, five of each image, and predictions: some close to a reference, some not, one empty."""
    rng = random.Random(seed)
    makers = [
        _plain,
        _plain,
        _plain,
        _with(CONTRACTED),
        _with(NUMBERS),
        _with(ABBREVIATED),
        _with(JOINED),
        _with(FOREIGN),
    ]
    references = {100 + 7 * row: [rng.choice(makers)(rng).strip() for _ in range(5)] for row in range(images)}
    predictions = {}
    for image, captions in references.items():
        words = rng.choice(captions).split(" ")
        words[rng.randrange(len(words))] = rng.choice(NOUNS)
        predictions[image] = rng.choice([" ".join(words), captions[0], rng.choice(makers)(rng).strip()])
    predictions[100], predictions[107] = "", "..."
    return references, predictions


def pycocoevalcap_scores(
    references: dict[int, list[str]], predictions: dict[int, str]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Name → score and name → score of each image, by pycocoevalcap alone, without SPICE."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    gts = {image: [{"caption": caption} for caption in captions] for image, captions in references.items()}
    wanted = PTBTokenizer().tokenize(gts)
    predicted = PTBTokenizer().tokenize({image: [{"caption": predictions[image]}] for image in references})
    bleu, bleus = Bleu(4).compute_score(wanted, predicted, verbose=0)
    totals = {f"Bleu_{n + 1}": score for n, score in enumerate(bleu)}
    each = {f"Bleu_{n + 1}": scores for n, scores in enumerate(bleus)}
    for name, scorer in {"METEOR": Meteor(), "ROUGE_L": Rouge(), "CIDEr": Cider()}.items():
        totals[name], each[name] = scorer.compute_score(wanted, predicted)
    return {k: float(v) for k, v in totals.items()}, {k: [float(x) for x in v] for k, v in each.items()}


def write_scores() -> None:
    references, predictions = make_captions(60, TABLE_SEED)
    totals, each = pycocoevalcap_scores(references, predictions)
    table = {"references": references, "predictions": predictions, "scores": totals, "per_image": each}
    SCORES.write_text(json.dumps(table, ensure_ascii=True, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_table()
    write_scores()
