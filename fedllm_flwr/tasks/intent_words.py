"""Names of rooms and devices that fill the open slots of the smart-home sentence templates.

The templates leave the names of a home to its owner. These are ordinary ones, written for this project,
the same number in each language, so that no language is easier for its fillers. Keys are slot names
(``area``, ``floor``, ``timer_name``) or the device domain that a template asks a ``name`` of.
"""

_COMMA_SEPARATED: dict[str, dict[str, str]] = {
    "en": {
        "area": "kitchen, living room, bedroom, bathroom, office, garage, hallway",
        "floor": "ground floor, first floor, upper floor, basement",
        "light": "reading lamp, ceiling lamp, desk lamp, night lamp, spotlight",
        "switch": "coffee machine, heater, Christmas tree",
        "fan": "ceiling fan, extractor, desk fan",
        "media_player": "television, radio, stereo, speaker, soundbar",
        "climate": "thermostat, air conditioner, heat pump, boiler",
        "vacuum": "Robby, Dusty, robot cleaner, hoover, Sweeper, Mister Clean, Mopsy, Rosie, "
        "Turtle, little helper",
        "weather": "Berlin, Paris, Madrid, Rome, Warsaw, Cairo, London, Athens, Lisbon, Oslo",
        "timer_name": "pizza, pasta, tea, eggs, laundry, homework",
    },
    "de": {
        "area": "Küche, Wohnzimmer, Schlafzimmer, Bad, Büro, Garage, Flur",
        "floor": "Erdgeschoss, Obergeschoss, Dachgeschoss, Keller",
        "light": "Leselampe, Deckenlampe, Schreibtischlampe, Nachtlampe, Strahler",
        "switch": "Kaffeemaschine, Heizlüfter, Weihnachtsbaum",
        "fan": "Deckenventilator, Abzug, Tischventilator",
        "media_player": "Fernseher, Radio, Stereoanlage, Lautsprecher, Soundbar",
        "climate": "Thermostat, Klimaanlage, Wärmepumpe, Heizung",
        "vacuum": "Robby, Staubi, Saugroboter, Sauger, Feger, Putzteufel, Rosi, Schildi, "
        "Wischi, kleiner Helfer",
        "weather": "Berlin, Paris, Madrid, Rom, Warschau, Kairo, London, Athen, Lissabon, Oslo",
        "timer_name": "Pizza, Nudeln, Tee, Eier, Wäsche, Hausaufgaben",
    },
    "fr": {
        "area": "cuisine, salon, chambre, salle de bain, bureau, garage, couloir",
        "floor": "rez-de-chaussée, premier étage, grenier, sous-sol",
        "light": "lampe de lecture, plafonnier, lampe de bureau, veilleuse, spot",
        "switch": "machine à café, radiateur, sapin de Noël",
        "fan": "ventilateur de plafond, hotte, ventilateur de bureau",
        "media_player": "télévision, radio, chaîne stéréo, enceinte, barre de son",
        "climate": "thermostat, climatiseur, pompe à chaleur, chaudière",
        "vacuum": "Robby, Poussin, robot aspirateur, aspirateur, balayeur, Monsieur Net, "
        "Rosalie, Tortue, Mopsy, petit aide",
        "weather": "Berlin, Paris, Madrid, Rome, Varsovie, Le Caire, Londres, Athènes, "
        "Lisbonne, Oslo",
        "timer_name": "pizza, pâtes, thé, œufs, lessive, devoirs",
    },
    "es": {
        "area": "cocina, salón, dormitorio, baño, oficina, garaje, pasillo",
        "floor": "planta baja, primera planta, ático, sótano",
        "light": "lámpara de lectura, lámpara de techo, flexo, luz de noche, foco",
        "switch": "cafetera, calefactor, árbol de Navidad",
        "fan": "ventilador de techo, extractor, ventilador de mesa",
        "media_player": "televisor, radio, equipo de música, altavoz, barra de sonido",
        "climate": "termostato, aire acondicionado, bomba de calor, caldera",
        "vacuum": "Robby, Polvito, robot aspirador, aspiradora, barredor, Don Limpio, Rosita, "
        "Tortuga, Mopi, pequeño ayudante",
        "weather": "Berlín, París, Madrid, Roma, Varsovia, El Cairo, Londres, Atenas, Lisboa, Oslo",
        "timer_name": "pizza, pasta, té, huevos, colada, deberes",
    },
    "it": {
        "area": "cucina, soggiorno, camera da letto, bagno, ufficio, garage, corridoio",
        "floor": "piano terra, primo piano, soffitta, cantina",
        "light": "lampada da lettura, plafoniera, lampada da tavolo, lumino, faretto",
        "switch": "macchina del caffè, stufetta, albero di Natale",
        "fan": "ventilatore da soffitto, cappa, ventilatore da tavolo",
        "media_player": "televisore, radio, stereo, altoparlante, soundbar",
        "climate": "termostato, condizionatore, pompa di calore, caldaia",
        "vacuum": "Robby, Polverino, robot aspirapolvere, aspirapolvere, spazzino, Lindo, "
        "Rosina, Tartaruga, Moppi, piccolo aiutante",
        "weather": "Berlino, Parigi, Madrid, Roma, Varsavia, Il Cairo, Londra, Atene, Lisbona, "
        "Oslo",
        "timer_name": "pizza, pasta, tè, uova, bucato, compiti",
    },
    "nl": {
        "area": "keuken, woonkamer, slaapkamer, badkamer, kantoor, garage, gang",
        "floor": "begane grond, eerste verdieping, zolder, kelder",
        "light": "leeslamp, plafondlamp, bureaulamp, nachtlamp, spot",
        "switch": "koffiemachine, kachel, kerstboom",
        "fan": "plafondventilator, afzuigkap, tafelventilator",
        "media_player": "televisie, radio, stereo, luidspreker, soundbar",
        "climate": "thermostaat, airco, warmtepomp, ketel",
        "vacuum": "Robby, Stoffie, robotstofzuiger, stofzuiger, veger, Poetsje, Roosje, "
        "Schildpad, Moppie, kleine hulp",
        "weather": "Berlijn, Parijs, Madrid, Rome, Warschau, Caïro, Londen, Athene, Lissabon, Oslo",
        "timer_name": "pizza, pasta, thee, eieren, was, huiswerk",
    },
    "pl": {
        "area": "kuchnia, salon, sypialnia, łazienka, biuro, garaż, korytarz",
        "floor": "parter, pierwsze piętro, poddasze, piwnica",
        "light": "lampka do czytania, lampa sufitowa, lampka biurkowa, lampka nocna, reflektor",
        "switch": "ekspres do kawy, grzejnik, choinka",
        "fan": "wentylator sufitowy, okap, wentylator stołowy",
        "media_player": "telewizor, radio, wieża stereo, głośnik, soundbar",
        "climate": "termostat, klimatyzator, pompa ciepła, piec",
        "vacuum": "Robby, Pyłek, robot sprzątający, odkurzacz, zamiatacz, Czyścioch, Rózia, "
        "Żółwik, Mopik, mały pomocnik",
        "weather": "Berlin, Paryż, Madryt, Rzym, Warszawa, Kair, Londyn, Ateny, Lizbona, Oslo",
        "timer_name": "pizza, makaron, herbata, jajka, pranie, zadanie domowe",
    },
    "ar": {
        "area": "المطبخ, غرفة الجلوس, غرفة النوم, الحمام, المكتب, المرآب, الممر",
        "floor": "الطابق الأرضي, الطابق الأول, السطح, القبو",
        "light": "مصباح القراءة, مصباح السقف, مصباح المكتب, مصباح الليل, الكشاف",
        "switch": "آلة القهوة, المدفأة, شجرة الزينة",
        "fan": "مروحة السقف, الشفاط, مروحة المكتب",
        "media_player": "التلفاز, الراديو, الستيريو, مكبر الصوت, السماعة",
        "climate": "منظم الحرارة, المكيف, المضخة الحرارية, السخان",
        "vacuum": "روبي, غبار, الروبوت, المكنسة الكهربائية, الكناس, نظيف, روزي, السلحفاة, "
        "موبي, المساعد الصغير",
        "weather": "برلين, باريس, مدريد, روما, وارسو, القاهرة, لندن, أثينا, لشبونة, أوسلو",
        "timer_name": "البيتزا, المعكرونة, الشاي, البيض, الغسيل, الواجبات",
    },
}

FILLERS: dict[str, dict[str, tuple[str, ...]]] = {
    language: {slot: tuple(words.split(", ")) for slot, words in slots.items()}
    for language, slots in _COMMA_SEPARATED.items()
}
"""Language code to slot or device domain to words."""
