// How the search ranks what it finds: chapters first, appendices and evidence, the package last.
// Of pages that tie those come first that use the words most: the index names them in that order.
const asked = new URLSearchParams(window.location.search).get("q") || "";
const use = page => {
  const {docnames, terms, titleterms} = Search._index, file = docnames.indexOf(page);
  const shares = [...Search._parseQuery(asked)[1]].map(word => {
    const pages = [titleterms[word], terms[word]].flat(), place = pages.indexOf(file);
    return place < 0 ? 0 : 1 - (place + 1) / (pages.length + 1);
  });
  return shares.reduce((sum, share) => sum + share / shares.length, 0);
};
var Scorer = {
  score: ([page, title, anchor, description, score]) => {
    score += use(page);  // less than 1
    if (/^(book\/api|genindex|py-modindex)/.test(page)) return score - 100;
    if (/^book\/(evidence\/|claims|questions|references|last-run)/.test(page)) return score - 5;
    return page === "book/glossary" ? score : score + 10;
  },
  objNameMatch: 11, objPartialMatch: 6, objPrio: {0: 15, 1: 5, 2: -5}, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
};
// Numbers such as 0.01 are words; the stemmer does not know that dying is to die. The words stand in
// a plain object, where Sphinx would take "constructor" for one of the book's and never finish.
var splitQuery = query => (query.match(/\d+\.\d+|[\p{Letter}\p{Number}_]+/gu) || [])
  .map(word => word.toLowerCase() === "dying" ? "die" : word)
  .filter(word => !(new Stemmer().stemWord(word.toLowerCase()) in {}));
