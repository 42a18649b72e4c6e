"""What the corpus filters find and what they leave alone, on generated rows whose truth is known.

    python benchmarks/bench_quality.py
    python benchmarks/bench_quality.py --real FOLDER --half odd

30,000 synthetic rows with planted duplicates; evaluation items planted in as many training rows; sentences with and
without made-up personal data. All text is synthetic and means nothing medically.

With --real it reads the rows of real files whose hash is even or odd, and takes a fifth of them as evaluation data. It
lists the other rows that overlap with these, and all near duplicates, each beside its match, to be judged by eye.
"""

# ruff: noqa: E501, for the lists of words

import argparse
import random
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

SLOTS = {
    "who": "宝宝 孩子 我家儿子 我女儿 小侄女 外孙 双胞胎里的老大 邻居家的小男孩 我弟弟家的娃 小家伙".split(),
    "age": [f"{i}个月" for i in range(2, 24)] + [f"{i}岁" for i in range(2, 14)] + [f"{i}岁半" for i in range(2, 8)],
    "days": [f"{i}天" for i in range(2, 15)] + "昨晚 前天下午 一个多星期 半个月 上个月 今天早上 两三周 断断续续一年".split(),
    "symptom": "发烧 咳嗽 流鼻涕 拉肚子 呕吐 起红疹 便秘 夜里哭闹 不爱吃饭 嗓子哑 喘息 鼻塞 打喷嚏 手脚冰凉 出汗多 肚子疼 头疼 "
    "流口水 眼屎多 耳朵疼 尿频 大便发绿 吐奶 嘴唇干裂 脖子后面有小疙瘩 走路摇晃 磨牙 说梦话 牙龈出血 膝盖疼 脸色发白 腹胀 打嗝 "
    "皮肤瘙痒 睡觉打呼噜 腿上有淤青 眼睛发红 声音嘶哑 口臭 盗汗".split(),
    "disease": [a + b for a in "小儿 急性 慢性 过敏性 病毒性 细菌性 反复性 幼年".split() for b in
                "支气管炎 肺炎 中耳炎 鼻窦炎 咽峡炎 肠炎 结膜炎 荨麻疹 湿疹 扁桃体炎 喉炎 淋巴结炎 关节炎 腮腺炎".split()],
    "test": "血常规 尿常规 便常规 胸片 腹部超声 过敏原检测 C反应蛋白 肺功能 脑电图 微量元素 骨密度 听力筛查 心脏彩超 咽拭子 支原体抗体".split(),
    "food": "苹果泥 南瓜粥 鸡蛋羹 虾仁 牛奶 酸奶 西瓜 花生酱 猕猴桃 胡萝卜汁 小米粥 鱼肉 山药泥 菠菜面 芒果".split(),
    "number": [f"{i / 10:.1f}" for i in range(361, 409)] + [str(i) for i in range(12, 160)],
    "cause": "受凉 换季 吃得太杂 接触了生病的同学 家里养猫 空气干燥 睡得太晚 喝水太少 床单螨虫 奶粉更换 出游劳累 游泳后没擦干 穿得太厚 地毯灰尘".split(),
    "care": "多喝温水 注意保暖 保持室内通风 饮食清淡 少去人多的地方 观察精神状态 按时复查 用温毛巾擦身 适当补充水分 保证睡眠 "
    "不要捂汗 记录体温变化 勤洗手 少量多餐 抬高床头 避开过敏的东西 每天户外活动 保持皮肤干爽".split(),
    "danger": "精神差 呼吸急促 持续高热不退 抽搐 尿量明显减少 嗜睡 口唇发紫 频繁呕吐 皮肤出现瘀点 拒绝喝水".split(),
    "dept": "儿科 呼吸科 消化科 耳鼻喉科 皮肤科 儿童保健科 发热门诊 神经内科 免疫科 急诊".split(),
    "city": "青岛 洛阳 襄阳 大理 绵阳 赣州 桂林 宝鸡 包头 遵义 温州 岳阳 芜湖 漳州 临沂 烟台 保定 大同".split(),
}  # fmt: skip
ASKED = [
    "{who}{age}了，{symptom}{days}，还有点{symptom}，是不是{disease}？",
    "我们在{city}，{who}{age}，{days}开始{symptom}，量了{number}，要不要做{test}？",
    "{who}得了{disease}，现在{symptom}，可以吃{food}吗，{days}能好？",
    "医生好，{who}{symptom}，{city}的大夫说是{cause}引起的，{test}要不要查？",
    "{who}{age}，吃了{food}以后{symptom}，{days}没有好转，挂{dept}还是{dept}？",
    "请教一下，{disease}好了{days}，{who}又{symptom}，跟{cause}有关系吗？",
]
SAID = [
    "从您说的情况看，{symptom}和{symptom}同时出现，首先要考虑{disease}的可能。",
    "{age}的孩子抵抗力还在发育，{cause}以后容易出现{symptom}。",
    "建议先到{dept}做{test}，如果结果超过{number}，再查{test}。",
    "在家里可以{care}、{care}，同时{care}。",
    "{disease}一般持续{days}，多数孩子不会留下后遗症。",
    "这几天先不要吃{food}，可以换成{food}或者{food}。",
    "如果{days}以后仍然{symptom}，或者出现{danger}，请马上到急诊。",
    "{test}正常的话，{symptom}多半是{cause}造成的，家长不必过分担心。",
    "另外要留意家里有没有{cause}的情况，{city}这个季节{disease}比较多见。",
    "{who}若是体温到了{number}左右并且{danger}，说明病情有变化。",
    "我见过不少{disease}的小朋友，{care}之后{symptom}就慢慢减轻了。",
    "之前有{city}的家长问过，{food}和{disease}没有直接关系，关键还是{care}。",
    "复查{test}的时间可以放在{days}之后，不需要反复抽血。",
    "母乳喂养的妈妈也要少吃{food}，避免{symptom}加重。",
    "如果合并{disease}，{symptom}会更明显，需要{dept}和{dept}一起看。",
    "平时{care}，比单纯等{symptom}自己消失要好。",
]
POLITE = [
    "不客气，祝您早日康复！", "不客气，祝宝宝健康成长。", "您好，根据您的描述，", "如果还有其他问题，请随时咨询，祝孩子早日康复。",
    "不用谢，有什么不清楚的地方可以随时再来问我。", "多喝水。", "好的，谢谢医生。",
]  # fmt: skip
HELLO = "您好，很高兴为您解答，根据您的描述，我给您以下几点建议供您参考："
BYE = "以上是我的建议，希望对您有所帮助，如果症状没有缓解，请及时到正规医院就诊，祝孩子早日康复。"
SLOT = re.compile(r"\{(\w+)\}")
COMMON = "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多定行学法所民得经"


def fill(rng: random.Random, form: str) -> str:
    return SLOT.sub(lambda match: rng.choice(SLOTS[match[1]]), form)


def row(rng: random.Random) -> tuple[str, str]:
    """A question of some 70 characters and an answer of some 250, half of them with the usual opening and end."""
    said = "".join(fill(rng, form) for form in rng.sample(SAID, rng.randint(5, 9)))
    if rng.random() < 0.5:
        said = HELLO + said + BYE
    return "".join(fill(rng, form) for form in rng.sample(ASKED, 2)), said


def edited(rng: random.Random, text: str, edits: int) -> str:
    """The text with so many characters replaced, inserted or left out."""
    letters = list(text)
    for place in rng.sample(range(len(letters)), edits):
        kind = rng.randrange(3)
        letters[place] = "" if kind == 0 else rng.choice(COMMON) + (letters[place] if kind == 1 else "")
    return "".join(letters)


def respelled(rng: random.Random, text: str) -> str:
    """Other punctuation, spaces and width, the same letters and digits."""
    text = text.translate(str.maketrans("，。？！：", rng.choice([",.?!:", "；！!。,", "  ?! "])))
    return text.translate({c: c + 0xFEE0 for c in range(0x30, 0x3A)}) if rng.random() < 0.5 else text + rng.choice("。 ！")


def plain(text: str) -> str:
    """The letters, digits, decimal points and symbols of a text, found without the library, which this is to test."""
    text = unicodedata.normalize("NFKC", text).casefold()
    points = {match.start() for match in re.finditer(r"(?<=\d)\.(?=\d)", text)}
    return "".join(c for i, c in enumerate(text) if unicodedata.category(c)[0] in "LNS" or i in points)


def similarity(one: str, other: str) -> float:
    """Exact Jaccard similarity of the character 5-grams."""
    sets = []
    for text in map(plain, (one, other)):
        sets.append({text[i : i + 5] for i in range(max(1, len(text) - 4))})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


# The numbers and Latin letters of a row. A character of COUNTING that an edit adds could make another number.
NUMBERS = re.compile(r"\d+(?:\.\d+)?(?:个月|岁半?|天)?|一个多星期|半个月|两三周|一年|每天|[A-Za-z]")
COUNTING = set("一个年分时成种")


def changed_to(rng: random.Random, text: str, low: float, high: float) -> str:
    """Edit a text until its similarity to the original lies between `low` and `high`; from 0.9 on its numbers stay."""
    while True:
        copy = text
        while (found := similarity(text, copy)) > high:
            change = edited(rng, copy, 1 if found < high + 0.1 else 3)
            same = NUMBERS.findall(change) == NUMBERS.findall(text) and not COUNTING & (Counter(change) - Counter(copy)).keys()
            copy = change if same or low < 0.9 else copy
        if found >= low:
            return copy


def recounted(rng: random.Random, text: str) -> str:
    """The text with another number in place of one of its numbers, or with a decimal point added or removed."""
    if not (found := list(re.finditer(r"\d+(?:\.\d+)?", text))):
        return text + "共5天。"
    match = rng.choice(found)
    numbers = [match[0].replace(".", "") if "." in match[0] else f"{match[0]}.5", str(int(float(match[0])) + rng.randint(1, 9))]
    return text[: match.start()] + rng.choice(numbers) + text[match.end() :]


def planted_duplicates(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Pairs of (text, kind), shuffled so that no copy stands before its original; one in thirty is of each kind of copy.

    A text is a "row" or a copy of one: "exact", "near" (similarity 0.9 to 0.97), "far" (0.45 to 0.55), or "number"
    (one number is changed).
    """
    texts = ["\n".join(row(rng)) for _ in range(count - count // 30 * 4)]
    placed = [(rng.random(), text, "row") for text in texts]
    ways = {
        "exact": respelled, "near": lambda rng, text: changed_to(rng, text, 0.9, 0.97),
        "far": lambda rng, text: changed_to(rng, text, 0.45, 0.55), "number": recounted,
    }  # fmt: skip
    for i in range(count - len(texts)):
        place, text, _ = placed[i]
        kind = list(ways)[i % 4]
        placed.append((rng.uniform(place, 1), ways[kind](rng, text), kind))
    return [(text, kind) for _, text, kind in sorted(placed)]


Item = tuple[str, str, bool]  # place, text, whether it is a question


def planted_contamination(rng: random.Random, items: int, count: int) -> tuple[list[Item], list[tuple[list[str], str]]]:
    """Evaluation items, and training rows of several messages with what is planted in each, "" for nothing.

    Clean rows have the same boilerplate, diseases and polite phrases as the items, and other facts.
    """
    evaluation: list[Item] = []
    for i in range(items // 2):
        asked, said = row(rng)
        evaluation += [(f"evaluation:{i}", asked, True), (f"evaluation:{i}", said, False)]
        if i % 5 == 0:
            evaluation.append((f"evaluation:{i}", rng.choice(POLITE), False))
    long = [text for _, text, _ in evaluation if len(plain(text)) >= 13 and text not in POLITE]
    questions = [text for _, text, question in evaluation if question]
    answers = [text for _, text, question in evaluation if not question and text not in POLITE]
    rows = []
    for i in range(count):
        asked, said = row(rng)
        kind = ("inside", "edited", "respelled", "question", "answer")[i // 4 % 5] if i % 4 == 0 else ""
        if kind == "inside":
            said = "".join(fill(rng, form) for form in rng.sample(SAID, 2)) + rng.choice(long) + said
        elif kind == "edited":
            text = rng.choice(long)
            said = edited(rng, text, rng.randint(1, max(1, len(plain(text)) // 10))) + rng.choice(["", said])
        elif kind == "respelled":
            asked = respelled(rng, rng.choice(long))
        elif kind == "question":
            asked = rng.choice(questions)
        elif kind == "answer":
            said = rng.choice(answers)
        elif i % 4 == 1:  # an item with other facts: half of the sentences stay
            parts = re.split("(?<=。)", rng.choice(answers))
            half = rng.sample(parts, len(parts) // 2) + [fill(rng, form) for form in rng.sample(SAID, 4)]
            said = "".join(half)
        rows.append(([asked, said, rng.choice(POLITE), rng.choice(POLITE)], kind))
    return evaluation, rows


SURNAMES = "王李张刘陈杨黄赵吴周徐孙马朱胡郭何林高罗郑梁谢宋唐许韩冯邓曹彭曾肖田董潘袁蔡蒋余于杜叶程魏苏吕丁任卢姚沈钟姜崔谭陆范汪廖石金韦贾夏付方邹熊白孟秦邱侯江尹薛闫段雷龙黎史陶贺毛郝顾龚邵万"
COMPOUND = "欧阳 上官 司马 诸葛 夏侯 皇甫 慕容 令狐".split()
GIVEN = "伟芳娜敏静丽强磊洋艳勇军杰娟涛明超兰霞平刚桂英华玉萍红娥玲芬燕彩春菊凤洁梅琳素云莲真环雪荣爱妹香月莺媛瑞凡佳嘉琼勤珍贞莉浩宇轩子涵梓萱欣怡思睿博文俊豪晨曦雨桐诗琪志国建斌鹏飞鑫波辉"


def name(rng: random.Random) -> str:
    surname = rng.choice(COMPOUND) if rng.random() < 0.04 else rng.choice(SURNAMES)
    return surname + "".join(rng.choices(GIVEN, k=1 if len(surname) == 2 else rng.choice((1, 2, 2))))


def wide(rng: random.Random, text: str, share: float = 0.1) -> str:
    if rng.random() > share:
        return text
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


def mobile(rng: random.Random) -> str:
    digits = rng.choice("130 131 133 135 136 137 138 139 147 150 151 153 157 158 166 172 176 178 180 182 187 189 191 198 199".split())
    digits += f"{rng.randrange(10**8):08}"
    form = rng.choice(["{0}{1}{2}", "{0}{1}{2}", "{0}{1}{2}", "{0} {1} {2}", "{0}-{1}-{2}"])
    prefix = rng.choice(["", "", "", "", "+86", "+86 ", "86-", "0086 ", "(+86)"])
    return wide(rng, prefix + form.format(digits[:3], digits[3:7], digits[7:]))


def landline(rng: random.Random) -> str:
    area = rng.choice("010 020 021 022 023 024 025 027 028 029 0571 0755 0311 0532 0791 0898 0431 0871 0951 0991".split())
    number = f"{rng.randint(2, 9)}{rng.randrange(10**7):07}"
    form = rng.choice(["{0}-{1}", "{0}-{1}", "{0}{1}", "({0}){1}", "（{0}）{1}", "{0} {1}", "{0}-{2}-{3}", "{0}-{1}转{4}"])
    return form.format(area, number, number[:4], number[4:], rng.randint(100, 9999))


def identity(rng: random.Random) -> str:
    born = date(1935, 1, 1) + timedelta(rng.randrange(32000))
    digits = rng.choice("110105 310115 440304 510107 320583 330106 420111 610113 230103 540102 650102 350203".split())
    if rng.random() < 0.15 and born.year < 2000:
        return f"{digits}{born:%y%m%d}{rng.randrange(1000):03}"
    digits += f"{born:%Y%m%d}{rng.randrange(1000):03}"
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    check = "10X98765432"[sum(int(d) * w for d, w in zip(digits, weights, strict=True)) % 11]
    return wide(rng, digits + rng.choice((check, check.lower())))


def email(rng: random.Random) -> str:
    local = rng.choice(["zhang.wei", "lily_2010", "mama-bao", "wx.chen", f"{rng.randrange(10**6, 10**10)}", "dr.li+kid"])
    return f"{local}{rng.choice('@@@@＠')}{rng.choice('qq.com 163.com gmail.com sina.com.cn hospital-mail.org.cn 126.com'.split())}"


def wechat(rng: random.Random) -> str:
    return rng.choice(["baoma", "wxid_", "lele-", "Doctor_", "xy"]) + f"{rng.randrange(10**4, 10**8)}"


def qq(rng: random.Random) -> str:
    return str(rng.randrange(10**5, 10**10))


PERSONAL = {
    "电话": (
        lambda rng: mobile(rng) if rng.random() < 0.7 else landline(rng),
        "我的手机号是{0}，请回电|电话{0}|联系方式：{0}。|孩子爸爸的号码{0}，妈妈的是{0}|有事打{0}找我，谢谢医生|手机:{0} 随时可以|"
        "可以拨打{0}预约吗？|聯絡電話：{0}|手機號碼{0}，謝謝醫生|请发短信到{0}|Tel：{0}|电话是 {0} ，下午有人接|（联系电话：{0}）|我把号码留给您{0}您看到了回我",
    ),
    "身份证号": (identity, "身份证号{0}|孩子的身份证是{0}，可以建卡吗|证件号：{0}。|身份证：{0}，姓名在上面|身份證號碼：{0}|{0}是我的身份证号码|挂号要用的({0})"),
    "邮箱": (email, "邮箱{0}|请把报告发到{0}，谢谢|我的e-mail：{0}。|片子发您邮箱了，我的是{0}请查收|联系：{0}；急"),
    "微信号": (wechat, "微信号：{0}|加我微信{0}，发照片给您|我的微信是{0}。|微信:{0}|vx：{0}|方便加个微信吗，微信号{0}"),
    "QQ号": (qq, "QQ：{0}|我的QQ是{0}，请加我|qq{0}|QQ号码：{0}。|扣扣{0}，在线等|加QQ {0} 发化验单"),
    "姓名": (
        name,
        "我叫{0}，孩子发烧|医生您好，我叫{0}今年32岁|我的名字叫{0}。|我名叫{0}，想问|姓名：{0} 性别：女|患者姓名:{0}，年龄5岁|姓名：{0}\n年龄：3岁|"
        "我儿子叫{0}，三岁|我家宝宝叫{0}，早产|女儿叫{0}今年上小学|我的孩子叫{0}，咳嗽|孩子叫{0}\n出生时很好|小孩叫{0}，1岁半|"
        "你好我叫{0}来自河南|姓名：{0}，电话没有|我叫{0} 最近头晕|我孩子叫{0}已经两岁了|患者姓名：{0} 年齡：3歲|兒子叫{0}，三歲|姓名：{0}（男）",
    ),
}  # fmt: skip
# Nothing to replace here. {n}, {m}: numbers; {d}, {e}, {f}: digits
HARMLESS = """我叫他不要动|我叫了救护车，正在路上|我叫王医生来看一下|孩子叫不醒，怎么办|宝宝叫声很尖|我叫车去的医院|女儿叫肚子疼{n}天了|我叫李阿姨帮忙带孩子
孩子叫妈妈了，{n}个月|宝宝叫个不停|我叫他爸爸回来|儿子叫我给他倒水|我叫张护士换药|这个叫川崎病|那种叫黄疸，不要紧|孩子叫疼|姓名、年龄、性别请写清楚|姓名：__
请填写姓名和电话|我叫周围的人帮忙|宝宝叫方便面是面面|我叫高主任看过|我叫马上过来的护士|姓名：未填|孩子叫苦不迭|白细胞{n}.{m}，中性粒细胞{n}%|血小板{d}，血红蛋白{n}
体温{n}.{m}度，心率{d}次|{y}年{k}月{k}日出生|{y}-{k}-{k} 做的检查|出生日期{y}{z}|末次月经{y}{z}，今天{y}{z}|每次喝奶{d}毫升，一天{k}次|身高{d}厘米，体重{n}斤
花了{e}元，还要再交{f}元|订单号：138{h}{h}|快递单号 {h}{h}{f}|订单编号{y}{h}{h}1|ISBN 978-7-117-{e}{k}-{k}|ISBN：9787{h}{e}1|流水号15{h}{k}{f}|编号：{h}{h}
检查单号123{h}{h}|1234567890{k}|序号 100{h}0|数值为{h}.{h}|范围{e}-{f}|血压{d}/{n}，{d}/{n}，{d}/{n}|国药准字Z{h}{k}|国药准字H{y}{e}
拨打120或者12320|热线400-{d}-{e}|潜伏期{k}到{n}天|HCG {e}{k}.{m}，孕酮{n}.{m}|{y}年到{y}年每年{d}例|第{n}-{d}页|DOI 10.{e}/j.{y}.{k}
微信扫码就可以挂号|关注微信公众号预约|微信支付{d}元|用QQ视频看过医生|QQ糖能不能吃|vx-809是一种药|微信上问的医生说没事|他是@医生 的学生|艾特@所有人
邮箱里没有收到报告|网址 www.hospital.cn/p/138{h}{h}.html|11位数是{o}|号码{o}是错的|病例编号 {c}|单号{c}|{n}孕周，{d}克|Apgar评分{k}-{k}-{k}
乙肝表面抗原{d}.{m}|谷丙转氨酶{d}，谷草{n}，总胆红素{n}.{m}|130 120 140 115 这几次的血压|{d} {d} {d} {d} {d}|坐标{n}.{h}，{d}.{h}|版本2.{k}.{e}
头孢曲松+Vancomycin{k}g|+VitaminB{k}|加voriconazole{d}mg|+Vincristine1.{k}mg/m2|HBV-DNA定量 158{h}{h} IU/mL|精子总数 186{h}{h}|白細胞計數135{h}{h}個""".replace("\n", "|").split("|")  # fmt: skip


def harmless(rng: random.Random) -> str:
    day = date(1990, 1, 1) + timedelta(rng.randrange(13000))
    made = {
        "n": lambda: str(rng.randint(2, 99)), "m": lambda: str(rng.randint(0, 99)), "k": lambda: str(rng.randint(1, 9)),
        "d": lambda: str(rng.randint(80, 400)), "e": lambda: str(rng.randint(1000, 9999)), "f": lambda: str(rng.randint(100, 9999)),
        "h": lambda: f"{rng.randrange(10**4):04}", "y": lambda: str(day.year), "z": lambda: f"{day:%m%d}",
        "o": lambda: rng.choice("10 11 12 200 202 154 142 160 163 168 179 600 955".split()).ljust(3, "5") + f"{rng.randrange(10**8):08}",
        "c": lambda: "110105" + f"{rng.randrange(13, 99)}{rng.randrange(13, 99)}{rng.randrange(10**8):08}",
    }  # fmt: skip
    return SLOT.sub(lambda match: made[match[1]](), rng.choice(HARMLESS))


def personal(rng: random.Random, count: int) -> Iterator[tuple[str, str, str]]:
    """(text, the text as it should be without personal data, its kind or "" for none), half with a row around."""
    for i in range(count):
        kind = list(PERSONAL)[i // 2 % len(PERSONAL)] if i % 2 else ""
        if kind:
            make, contexts = PERSONAL[kind]
            text = rng.choice(contexts.split("|"))
            filled, expected = re.sub(r"\{0\}", lambda _, make=make: make(rng), text), text.replace("{0}", f"【{kind}】")
        else:
            filled = expected = harmless(rng)
        if rng.random() < 0.5:
            before, after = fill(rng, rng.choice(ASKED)), fill(rng, rng.choice(SAID))
            filled, expected = f"{before}{filled}。{after}", f"{before}{expected}。{after}"
        yield filled, expected, kind


def list_real(folder: Path, half: str) -> None:
    """Print the real rows of one half that the rules would remove, each beside what it matches."""
    from pedgpt.corpus.assemble import items, messages
    from pedgpt.corpus.decontaminate import Decontaminator
    from pedgpt.corpus.duplicates import NearDuplicates, digest
    from pedgpt.corpus.quality import normalize
    from pedgpt.corpus.rows import map_texts, number, question
    from pedgpt.data import iter_records
    from pedgpt.data.readers import detect_kind

    rows, near, against = [], NearDuplicates(), Decontaminator()
    seen: dict[bytes, str] = {}
    for path in sorted(folder.iterdir()):
        try:
            records = list(iter_records(path, detect_kind(path), on_bad_row="skip")) if path.suffix != ".md" else []
        except ValueError as error:
            print(f"{path.name}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        for record in (map_texts(record, normalize) for record in records):
            place, said = f"{path.name}:{record.source.rpartition(':')[2]}", messages(record)
            if number("half", place) % 2 == (half == "odd") and seen.setdefault(digest("\n".join(said)), place) == place:
                near.add("\n".join(said))
                rows.append((place, record))
    places = {place: messages(record) for place, record in rows}
    training = [place for place, _ in rows if number("evaluation", place) % 5]
    for place, record in rows:
        for text in items(record) if number("evaluation", place) % 5 == 0 else ():
            against.add(place, text, question=text == question(record))
    for place in training:
        against.count(places[place])
    pairs = [(rows[i][0], rows[j][0], share) for i, j, share in near.find()]
    near.close()
    overlaps = [(place, *match) for place in training if (match := against.match(places[place]))]
    for kind, found in (("near duplicate", pairs), ("overlap", overlaps)):
        for place, other, share in found:
            print(f"--- {kind}, {share:.2f}: {place} | {other}")
            for one in (place, other):
                print("   ", " ‖ ".join(text[:300] for text in places[one])[:900].replace("\n", " "))
    print(f"{len(rows):,} rows, {len(training):,} of them for training: {len(pairs)} near duplicates, {len(overlaps)} overlaps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, help="folder of real rows")
    parser.add_argument("--half", choices=("even", "odd"), default="even", help="rows to read; rules are tuned on even rows only")
    arguments = parser.parse_args()
    if arguments.real:
        list_real(arguments.real, arguments.half)
        return

    from pedgpt.corpus.decontaminate import Decontaminator
    from pedgpt.corpus.duplicates import NearDuplicates, digest
    from pedgpt.corpus.quality import scrub

    rng, count = random.Random(0), 30_000
    table: list[tuple[str, int, int, int]] = []  # what, planted, found of them, found in all
    rows = planted_duplicates(rng, count)
    near, seen, exact = NearDuplicates(), set(), set()
    for i, (text, _) in enumerate(rows):
        key = digest(text)
        exact |= {i} if key in seen else set()
        seen.add(key)
        near.add(text)
    dropped = {i for i, _, _ in near.find()}
    near.close()
    of = {kind: {i for i, (_, found) in enumerate(rows) if found == kind} for kind in ("row", "exact", "near", "far", "number")}
    table.append(("exact duplicates, by digest", len(of["exact"]), len(of["exact"] & exact), len(exact)))
    planted = of["exact"] | of["near"]
    table.append(("near duplicates, 0.90 to 1", len(planted), len(planted & dropped), len(dropped)))
    far = len(of["far"]), len(of["far"] & dropped)
    numbers = len(of["number"]), len(of["number"] & (dropped | exact))
    originals = len(of["row"]), len(of["row"] & dropped)

    items, training = planted_contamination(rng, 10_000, count)
    against = Decontaminator()
    for place, text, question in items:
        against.add(place, text, question)
    for texts, _ in training:
        against.count(texts)
    matched = [against.match(texts) is not None for texts, _ in training]
    for kind in ("inside", "edited", "respelled", "question", "answer"):
        hits = [found for found, (_, what) in zip(matched, training, strict=True) if what == kind]
        table.append((f"evaluation items, {kind}", len(hits), sum(hits), -1))
    hits = [found for found, (_, what) in zip(matched, training, strict=True) if what]
    table.append(("evaluation items, all", len(hits), sum(hits), sum(matched)))

    right: dict[str, list[int]] = {kind: [0, 0, 0] for kind in PERSONAL}
    clean = touched = 0
    for text, expected, kind in personal(rng, count):
        scrubbed, counts = scrub(text)
        for found, number in counts.items():
            right[found][2] += number
        if kind:
            there = expected.count(f"【{kind}】")
            right[kind][0] += there
            right[kind][1] += there if scrubbed == expected else 0
        else:
            clean, touched = clean + 1, touched + (scrubbed != text)
    table += [(f"personal data, {kind}", *numbers) for kind, numbers in right.items()]

    print(f"{'planted':30}{'rows':>8}{'found':>8}{'recall':>9}{'precision':>11}")
    for what, there, found, everything in table:
        precision = f"{found / everything:>11.4f}" if everything >= 0 else ""
        print(f"{what:30}{there:>8,}{found:>8,}{found / there:>9.4f}{precision}")
    print(f"\n{'to be left alone':30}{'rows':>8}{'taken':>8}")
    innocent = len(training) - len(hits), sum(matched) - sum(hits)
    for what, counts in (
        ("copies of similarity 0.45-0.55", far), ("copies with another number", numbers), ("rows like others", originals), ("clean training rows", innocent),
        ("without personal data", (clean, touched)),
    ):  # fmt: skip
        print(f"{what:30}{counts[0]:>8,}{counts[1]:>8,}")
    missed = [row[0] for row in table if row[2] < 0.99 * row[1] or (row[3] > 0 and row[2] < 0.98 * row[3])]
    if missed:
        sys.exit(f"recall below 0.99 or precision below 0.98: {', '.join(missed)}")


if __name__ == "__main__":
    main()
