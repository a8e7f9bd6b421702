// How the search ranks what it finds: chapters first, appendices and evidence, the package last.
// Sphinx counts a word once a page, so pages that only mention a number tie with those about it.
const ABOUT = {"0.01": ["book/leaky-family", "book/learning-rate-and-optimizer"]};
const asked = new URLSearchParams(window.location.search).get("q") || "";
var Scorer = {
  score: ([page, title, anchor, description, score]) => {
    if ((ABOUT[asked.trim()] || []).includes(page)) return score + 30;
    if (/^(book\/api|genindex|py-modindex)/.test(page)) return score - 100;
    if (/^book\/(evidence\/|claims|questions|references|last-run)/.test(page)) return score - 5;
    return page === "book/glossary" ? score : score + 10;
  },
  objNameMatch: 11, objPartialMatch: 6, objPrio: {0: 15, 1: 5, 2: -5}, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
};
// Numbers such as 0.01 are words; the stemmer does not know that dying is to die.
var splitQuery = query => (query.match(/\d+\.\d+|[\p{Letter}\p{Number}_]+/gu) || [])
  .map(word => word.toLowerCase() === "dying" ? "die" : word);
