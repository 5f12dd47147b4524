# What jq has and jaq's library lacks. The texts of errors name kinds of values, never values.

# Formats
def _replace($old; $new): . / $old | join($new);
def _cell(f; $row):
  if . == null then ""
  elif isboolean or isnumber then tojson
  elif isstring then f
  else error("\(type) is not valid in a \($row) row") end;
def _row(f; $row; $between):
  if isarray then [.[] | _cell(f; $row)] | join($between)
  else error("\(type) cannot be \($row)-formatted, only an array can be") end;
def @csv: _row("\"" + _replace("\""; "\"\"") + "\""; "csv"; ",");
def @tsv: _row(_replace("\\"; "\\\\") | _replace("\t"; "\\t") | _replace("\n"; "\\n") | _replace("\r"; "\\r"); "tsv"; "\t");
def @base32:  tostring | encode_base32;
def @base32d: tostring | decode_base32;
def format($name):
  if   $name == "text" then @text elif $name == "json" then @json elif $name == "csv" then @csv elif $name == "tsv" then @tsv
  elif $name == "html" then @html elif $name == "uri" then @uri elif $name == "urid" then @urid elif $name == "sh" then @sh
  elif $name == "base64" then @base64 elif $name == "base64d" then @base64d
  elif $name == "base32" then @base32 elif $name == "base32d" then @base32d
  else error("there is no such format") end;

# SQL
def IN(s): any(s == .; .);
def IN(src; s): any(src == s; .);
def INDEX(stream; f): reduce stream as $row ({}; .[$row | f | tostring] = $row);
def INDEX(f): INDEX(.[]; f);
def JOIN($index; f): [.[] | [., $index[f]]];
def JOIN($index; stream; f): stream | [., $index[f]];
def JOIN($index; stream; f; join): stream | [., $index[f]] | join;

# Streams
def tostream:
  def post: (.[]? | post), .;
  path(post) as $p | getpath($p) | reduce path(.[]?) as $q ([$p, .]; [$p + $q]);
# As setpath, which here takes no index beyond an array's end.
def _put($path; $value):
  if $path == [] then $value
  else $path[0] as $at | (. // (if $at | isnumber then [] else {} end))
    | (try .[$at] catch null | _put($path[1:]; $value)) as $new
    | if isarray and $at >= length then . + [range($at - length) | null] + [$new] else .[$at] = $new end end;
def fromstream(f):
  foreach f as $i ({x: null, e: false};
    (if .e then {x: null, e: false} else . end) as $s
    | if $i | length == 2
      then {x: ($s.x | _put($i[0]; $i[1])), e: ($i[0] == [])}
      else {x: $s.x, e: ($i[0] | length == 1)} end;
    if .e then .x else empty end);
def truncate_stream(stream): . as $n | null | stream | if .[0] | length > $n then .[0] |= .[$n:] else empty end;

# Dates
def date: todate;
def dateadd(u; n): . + n;
def datesub(u; n): . - n;

# The rest
def ascii: [.] | implode;
def bsearch($x):
  . as $all | [0, length]
  | until(.[0] >= .[1]; ((.[0] + .[1]) / 2 | floor) as $m | if $all[$m] < $x then [$m + 1, .[1]] else [.[0], $m] end)
  | .[0] | if . < ($all | length) and $all[.] == $x then . else -1 - . end;
def have_decnum: false;
def have_literal_numbers: true;
def isvalid(f): try (f | true) catch false;
def leaf_paths: paths(scalars);
def toarray: if isarray then . else [.] end;
def trimstr($x): ltrimstr($x) | rtrimstr($x);
