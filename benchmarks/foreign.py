"""Speech in other languages than English: a synthesizer (Festival) reads the Universal Declaration of Human Rights."""

import subprocess
import tempfile

from audio import Speech

from whisperkv.transcription.audio import read_audio

PACKAGES = "festival festvox-ru festvox-czech-dita festvox-suopuhe-lj festvox-italp16k festvox-ca-ona-hts"
VOICES = {  # and how it reads letters
    "ru": ("voice_msu_ru_nsh_clunits", "utf-8"),
    "cs": ("voice_czech_dita", "iso-8859-2"),
    "fi": ("voice_suo_fi_lj_diphone", "iso-8859-1"),
    "it": ("voice_lp_diphone", "iso-8859-1"),
    "ca": ("voice_upc_ca_ona_hts", "iso-8859-15"),
}
ARTICLES = {  # 1, 3, 4, 5, 6 and 9
    "ru": [
        "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью и "
        "должны поступать в отношении друг друга в духе братства.",
        "Каждый человек имеет право на жизнь, на свободу и на личную неприкосновенность.",
        "Никто не должен содержаться в рабстве или в подневольном состоянии; рабство и работорговля запрещаются во "
        "всех их видах.",
        "Никто не должен подвергаться пыткам или жестоким, бесчеловечным или унижающим его достоинство обращению и "
        "наказанию.",
        "Каждый человек, где бы он ни находился, имеет право на признание его правосубъектности.",
        "Никто не может быть подвергнут произвольному аресту, задержанию или изгнанию.",
    ],
    "cs": [
        "Všichni lidé rodí se svobodní a sobě rovní co do důstojnosti a práv. Jsou nadáni rozumem a svědomím a mají "
        "spolu jednat v duchu bratrství.",
        "Každý má právo na život, svobodu a osobní bezpečnost.",
        "Nikdo nesmí být držen v otroctví nebo nevolnictví; všechny formy otroctví a obchodu s otroky jsou zakázány.",
        "Nikdo nesmí být mučen nebo podrobován krutému, nelidskému nebo ponižujícímu zacházení nebo trestu.",
        "Každý má právo na to, aby byla všude uznávána jeho právní osobnost.",
        "Nikdo nesmí být svévolně zatčen, držen ve vazbě nebo vyhoštěn do vyhnanství.",
    ],
    "fi": [
        "Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan. Heille on annettu järki ja "
        "omatunto, ja heidän on toimittava toisiaan kohtaan veljeyden hengessä.",
        "Kullakin yksilöllä on oikeus elämään, vapauteen ja henkilökohtaiseen turvallisuuteen.",
        "Ketään ei saa pitää orjana tai orjuutettuna; orjuus ja orjakauppa kaikissa muodoissaan on kiellettävä.",
        "Ketään ei saa kiduttaa eikä kohdella tai rangaista julmasti, epäinhimillisesti tai alentavasti.",
        "Jokaisella on oikeus kaikkialla siihen, että hänet tunnustetaan oikeushenkilöksi.",
        "Ketään ei saa mielivaltaisesti pidättää, vangita tai ajaa maanpakoon.",
    ],
    "it": [
        "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti. Essi sono dotati di ragione e di "
        "coscienza e devono agire gli uni verso gli altri in spirito di fratellanza.",
        "Ogni individuo ha diritto alla vita, alla libertà ed alla sicurezza della propria persona.",
        "Nessun individuo potrà essere tenuto in stato di schiavitù o di servitù; la schiavitù e la tratta degli "
        "schiavi saranno proibite sotto qualsiasi forma.",
        "Nessun individuo potrà essere sottoposto a tortura o a trattamento o a punizioni crudeli, inumani o "
        "degradanti.",
        "Ogni individuo ha diritto, in ogni luogo, al riconoscimento della sua personalità giuridica.",
        "Nessun individuo potrà essere arbitrariamente arrestato, detenuto o esiliato.",
    ],
    "ca": [
        "Tots els éssers humans neixen lliures i iguals en dignitat i en drets. Són dotats de raó i de consciència, i "
        "han de comportar-se fraternalment els uns amb els altres.",
        "Tot individu té dret a la vida, a la llibertat i a la seguretat de la seva persona.",
        "Cap individu no serà sotmès a esclavitud o servitud: l'esclavitud i el tràfic d'esclaus són prohibits en "
        "totes llurs formes.",
        "Cap individu no serà sotmès a tortures ni a penes o tractes cruels, inhumans o degradants.",
        "Tot ésser humà té dret, arreu, al reconeixement de la seva personalitat jurídica.",
        "Ningú no pot ser arbitràriament detingut, pres ni desterrat.",
    ],
}


def foreign(count=30):
    """So many of them at most, the languages one after another."""
    return [spoken(language, text) for language, texts in ARTICLES.items() for text in texts][:count]


def spoken(language, text):
    voice, letters = VOICES[language]
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        command = ["text2wave", "-eval", f"({voice})", "-o", file.name]
        try:
            subprocess.run(command, input=text.encode(letters), check=True, stderr=subprocess.DEVNULL)
        except (FileNotFoundError, subprocess.CalledProcessError):
            raise SystemExit(f"audio of other languages: apt-get install {PACKAGES}") from None
        return Speech(language, read_audio(file.name), text, language)
