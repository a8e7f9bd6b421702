// How the search ranks what it finds: chapters first, their evidence behind, the package last.
var Scorer = {
  score: ([page, title, anchor, description, score]) => {
    if (/^(book\/api|genindex|py-modindex)/.test(page)) return score - 100;
    if (page.startsWith("book/evidence/")) return score - 6;
    if (/^book\/(claims|questions|references|runs)$/.test(page)) return score - 3;
    return score;
  },
  objNameMatch: 11, objPartialMatch: 6, objPrio: {0: 15, 1: 5, 2: -5}, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
};
