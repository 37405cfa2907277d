// Formulas are in elements of the class arithmatex, as \(…\) or \[…\]. KaTeX 0.19.1 lies beside this file, as npm has it (MIT);
// of its fonts only woff2, and its style sheet names no others.
for (const element of document.querySelectorAll(".arithmatex")) {
  const text = element.textContent.trim();
  katex.render(text.slice(2, -2), element, { displayMode: text.startsWith("\\["), throwOnError: false });
}
