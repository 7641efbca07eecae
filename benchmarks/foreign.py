"""Speech in other languages than English: a synthesizer (espeak-ng) reads the Universal Declaration of Human Rights."""

import subprocess
import tempfile

from audio import Speech

from whisperkv.transcription.audio import read_audio

ARTICLES = {  # 1, 3, 4, 5 and 6
    "fr": [
        "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de "
        "conscience et doivent agir les uns envers les autres dans un esprit de fraternité.",
        "Tout individu a droit à la vie, à la liberté et à la sûreté de sa personne.",
        "Nul ne sera tenu en esclavage ni en servitude; l'esclavage et la traite des esclaves sont interdits sous "
        "toutes leurs formes.",
        "Nul ne sera soumis à la torture, ni à des peines ou traitements cruels, inhumains ou dégradants.",
        "Chacun a le droit à la reconnaissance en tous lieux de sa personnalité juridique.",
    ],
    "de": [
        "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt "
        "und sollen einander im Geist der Brüderlichkeit begegnen.",
        "Jeder hat das Recht auf Leben, Freiheit und Sicherheit der Person.",
        "Niemand darf in Sklaverei oder Leibeigenschaft gehalten werden; Sklaverei und Sklavenhandel sind in allen "
        "ihren Formen verboten.",
        "Niemand darf der Folter oder grausamer, unmenschlicher oder erniedrigender Behandlung oder Strafe "
        "unterworfen werden.",
        "Jeder hat das Recht, überall als rechtsfähig anerkannt zu werden.",
    ],
    "es": [
        "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón y "
        "conciencia, deben comportarse fraternalmente los unos con los otros.",
        "Todo individuo tiene derecho a la vida, a la libertad y a la seguridad de su persona.",
        "Nadie estará sometido a esclavitud ni a servidumbre; la esclavitud y la trata de esclavos están prohibidas "
        "en todas sus formas.",
        "Nadie será sometido a torturas ni a penas o tratos crueles, inhumanos o degradantes.",
        "Todo ser humano tiene derecho, en todas partes, al reconocimiento de su personalidad jurídica.",
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
    ],
    "pt": [
        "Todos os seres humanos nascem livres e iguais em dignidade e em direitos. Dotados de razão e de "
        "consciência, devem agir uns para com os outros em espírito de fraternidade.",
        "Todo indivíduo tem direito à vida, à liberdade e à segurança pessoal.",
        "Ninguém será mantido em escravatura ou em servidão; a escravatura e o trato dos escravos, sob todas as "
        "formas, são proibidos.",
        "Ninguém será submetido a tortura nem a penas ou tratamentos cruéis, desumanos ou degradantes.",
        "Todos os indivíduos têm direito ao reconhecimento, em todos os lugares, da sua personalidade jurídica.",
    ],
    "nl": [
        "Alle mensen worden vrij en gelijk in waardigheid en rechten geboren. Zij zijn begiftigd met verstand en "
        "geweten, en behoren zich jegens elkander in een geest van broederschap te gedragen.",
        "Een ieder heeft het recht op leven, vrijheid en onschendbaarheid van zijn persoon.",
        "Niemand zal in slavernij of horigheid gehouden worden. Slavernij en slavenhandel in iedere vorm zijn "
        "verboden.",
        "Niemand zal onderworpen worden aan folteringen, noch aan een wrede, onmenselijke of onterende behandeling "
        "of bestraffing.",
        "Een ieder heeft, waar hij zich ook bevindt, het recht als persoon erkend te worden voor de wet.",
    ],
}


def foreign(count=30):
    """So many of them at most, the languages one after another."""
    return [spoken(language, text) for language, texts in ARTICLES.items() for text in texts][:count]


def spoken(language, text):
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        try:
            subprocess.run(["espeak-ng", "-v", language, "-w", file.name, text], check=True)
        except FileNotFoundError:
            raise SystemExit("audio of other languages: install espeak-ng (apt-get install espeak-ng)") from None
        return Speech(language, read_audio(file.name), text, language)
