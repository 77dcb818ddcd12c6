# ruff: noqa: RUF001  (letters of other scripts)
"""A few sentences in many languages, and small collections of them: each query asks for one sentence in other words."""

import json
from pathlib import Path

# Name -> the reading that is detected, and sentences.
SENTENCES: dict[str, tuple[str, list[str]]] = {
    "chinese": (
        "ngrams",
        [
            "长城是中国古代修建的防御工程。",
            "熊猫主要吃竹子，生活在四川的山区。",
            "北京是中华人民共和国的首都。",
            "茶叶最早在云南被人们种植。",
        ],
    ),
    "japanese": (
        "ngrams",
        [
            "富士山は日本で一番高い山です。",
            "東京の地下鉄は毎日多くの人を運びます。",
            "抹茶は緑茶の葉を粉にしたものです。",
            "京都には古いお寺がたくさんあります。",
        ],
    ),
    "korean": (
        "ngrams",
        [
            "서울은 대한민국의 수도이다.",
            "김치는 배추로 만든 음식이다.",
            "한라산은 제주도에 있는 산이다.",
            "한글은 세종대왕이 만들었다.",
        ],
    ),
    "thai": (
        "ngrams",
        [
            "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย",
            "ช้างเป็นสัตว์ประจำชาติของไทย",
            "ต้มยำกุ้งเป็นอาหารรสเผ็ดเปรี้ยว",
            "แม่น้ำเจ้าพระยาไหลลงสู่อ่าวไทย",
        ],
    ),
    "german": (
        "german",
        [
            "Die alten Häuser in der Stadt wurden nach dem Krieg wieder aufgebaut.",
            "Der Bäcker verkauft am Morgen frische Brötchen und auch Kuchen.",
            "In den Wäldern leben viele Füchse, die nachts auf die Jagd gehen.",
            "Die Universität ist eine der ältesten des Landes und hat viele Studenten.",
        ],
    ),
    "french": (
        "french",
        [
            "Les maisons de la vieille ville ont été construites au siècle dernier.",
            "Le boulanger vend du pain frais tous les matins et aussi des gâteaux.",
            "Dans les forêts vivent des renards qui chassent la nuit avec leurs petits.",
        ],
    ),
    "spanish": (
        "spanish",
        [
            "Las casas del centro de la ciudad fueron construidas por los romanos.",
            "El panadero vende pan fresco por la mañana y también unos pasteles.",
            "En los bosques viven los zorros, que salen a cazar por la noche.",
        ],
    ),
    "dutch": (
        "dutch",
        [
            "De oude huizen in de stad werden na de oorlog weer opgebouwd.",
            "De bakker verkoopt in de ochtend vers brood en ook taart aan de mensen.",
            "In het bos leven veel vossen die in de nacht op jacht gaan.",
        ],
    ),
    "russian": (
        "russian",
        [
            "Старые дома в центре города были построены ещё в прошлом веке.",
            "Пекарь каждое утро продаёт свежий хлеб и пироги.",
            "В лесах живут лисы, которые выходят на охоту ночью.",
            "Университет был основан императрицей и стал известен по всей стране.",
        ],
    ),
    "arabic": (
        "arabic",
        [
            "القاهرة هي عاصمة مصر وأكبر مدنها.",
            "يبيع الخباز الخبز الطازج كل صباح.",
            "تعيش الثعالب في الغابات وتصطاد في الليل.",
            "تقع الأهرامات بالقرب من نهر النيل.",
        ],
    ),
    "hindi": (
        "hindi",
        [
            "दिल्ली भारत की राजधानी है और यहाँ बहुत लोग रहते हैं।",
            "किसान सुबह खेतों में काम करने जाते हैं।",
            "हिमालय के पहाड़ों पर पूरे साल बर्फ़ रहती है।",
            "यह किताब इतिहास के बारे में लिखी गई है।",
        ],
    ),
    "greek": ("greek", ["Η Αθήνα είναι η πρωτεύουσα της Ελλάδας.", "Οι αλεπούδες ζουν στα δάση."]),
    "ukrainian": ("none", ["Старі будинки в центрі міста були збудовані минулого століття.", "Їжаки живуть у лісі."]),
    "persian": ("none", ["تهران پایتخت ایران است و جمعیت زیادی دارد.", "گربه‌ها در خانه زندگی می‌کنند."]),
    "nepali": ("none", ["काठमाडौं नेपालको राजधानी हो।", "किसानहरू बिहान खेतमा काम गर्छन्।"]),
    "polish": (
        "english",
        ["Stare domy w centrum miasta zostały zbudowane po wojnie.", "Lisy żyją w lasach i polują nocą."],
    ),
    "english": (
        "english",
        ["The old houses in the town were built after the war.", "Foxes live in the woods and hunt at night."],
    ),
}

# Name -> queries; query i is answered by sentence i and by no other.
QUERIES = {
    "chinese": ["中国的长城", "熊猫吃什么", "首都在哪里", "谁最早种植茶叶"],
    "japanese": ["一番高い山", "東京の地下鉄", "緑茶の粉", "京都の古いお寺"],
    "korean": ["대한민국 수도", "배추 음식", "제주도 산", "세종대왕과 한글"],
    "thai": ["เมืองหลวงประเทศไทย", "สัตว์ประจำชาติ", "อาหารเผ็ด", "แม่น้ำเจ้าพระยา"],
    "german": ["Haus Städte", "frische Kuchen beim Bäcker", "Fuchs jagt im Wald", "Student an Universitäten"],
    "russian": ["постройка старого дома", "свежего хлеба", "лиса в лесу", "известные университеты"],
    "arabic": ["عاصمة المصر", "خباز", "ثعالب الغابة", "نهر النيل"],
    "hindi": ["भारतीय राजधानियाँ", "खेत का किसान", "पहाड़ी बर्फ़", "किताबें इतिहास"],
}


def write_language(folder: Path, name: str) -> Path:
    """A collection in BEIR layout: the sentences, and the queries that each ask for one of them."""
    (folder / "qrels").mkdir(parents=True)
    documents, queries = SENTENCES[name][1], QUERIES[name]
    for kind, texts in (("corpus", documents), ("queries", queries)):
        rows = [json.dumps({"_id": f"{kind[0]}{i}", "text": text}, ensure_ascii=False) for i, text in enumerate(texts)]
        (folder / f"{kind}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    lines = [f"q{i}\tc{i}\t1" for i in range(len(queries))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    return folder
